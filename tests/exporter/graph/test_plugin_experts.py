"""Graphs for the TensorRT plugin: the matrices of chosen experts are read where they lie, in steps and in chunks."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from sinkexport.model.experts import MAX_PICKS, declared_experts
from sinkexport.model.moe_layers import routers
from sinkexport.quant.recipe import load_recipe
from sinkexport.sources import LoadedModel
from sinkrt import Session
from sinkrt.contract import Manifest

from tests.exporter.calibration.test_calibrate import TEXT, calibrate, recipe
from tests.exporter.graph.plugin_evaluator import PluginBundle, errors_against
from tests.exporter.graph.test_experts import with_rounded_experts
from tests.exporter.graph.test_plugin_target import GEOMETRY, WIDE, T, exported
from tests.exporter.graph.test_quantize import with_rounded_weights
from tests.exporter.tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer
from tests.support import SharedExports, TinyBundle, random_ids

MODELS = ("mixtral", "qwen3_moe", "gpt_oss")  # 8 of 1, 5 of 2, 6 of 2 (transposed, biases)
KINDS = ("HalfExpertLinear", "Int8ExpertLinear")


def half_model(name: str, **changes: Any) -> Any:
    """Small weights, so that float16 costs little, and routers that it tips to another expert nowhere."""
    model = tiny_model(name, **{**WIDE[name], **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.4)
        for router in sorted(routers(model)):
            model.get_parameter(f"{router}.weight").mul_(10.0)
    return model.half()


def plugin_bundle(folder: Path, model: Any, recipe: str | None = None, **config: Any) -> Manifest:
    options = {} if recipe is None else {"recipe": load_recipe(recipe)}
    return exported(model, folder, target="tensorrt", dtype="fp16", **options, **config)


def float_model(name: str, recipe: str | None = None) -> Any:
    """The weights of `half_model` in float32, rounded as `recipe` rounds them."""
    return rounded_as(half_model(name).float(), recipe)


def rounded_as(model: Any, recipe: str | None) -> Any:
    if recipe is not None:
        kept = {f"{router}.weight" for router in routers(model)}
        kept = {name: weight.clone() for name, weight in model.state_dict().items() if name in kept}
        with_rounded_experts(with_rounded_weights(model)).load_state_dict(kept, strict=False)
    return model


def reference(folder: Path, model: Any, recipe: str | None = None, **config: Any) -> None:
    """For ONNX Runtime, in float32, of the same weights."""
    exported(rounded_as(model.float(), recipe), folder, **config)


def shared_plugin(shared: SharedExports, name: str, recipe: str | None = None) -> TinyBundle:
    """What `plugin_bundle` makes of `half_model(name)`."""
    options = {} if recipe is None else {"recipe": load_recipe(recipe)}
    return shared(functools.partial(half_model, name), **GEOMETRY, target="tensorrt", dtype="fp16", **options)


def shared_reference(shared: SharedExports, name: str, recipe: str | None = None) -> Path:
    """What `reference` makes of `half_model(name)`."""
    return shared(functools.partial(float_model, name, recipe), **GEOMETRY).path


def graph_of(folder: Path, role: str) -> onnx.GraphProto:
    return onnx.load(folder / f"{role}.onnx", load_external_data=False).graph


def expert_matmuls(graph: onnx.GraphProto) -> list[tuple[str, tuple[int, ...], int]]:
    """Matmuls by chosen experts: kind, shape of the matrices, picks."""
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.value_info}
    return [(n.op_type, sizes[n.input[1]], shapes[n.output[0]][0]) for n in graph.node if n.op_type in KINDS]


def others(graph: onnx.GraphProto) -> list[str]:
    """Nodes that read matrices of experts and are none of those."""
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 3 and ".experts." in tensor.name}
    return [n.op_type for n in graph.node if n.op_type not in KINDS and matrices & set(n.input)]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [None, "int8-channel"])
@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_the_onnx_bundle_does(name: str, recipe: str | None, shared_export: SharedExports) -> None:
    """Chunks first, then steps past two wraps, against ONNX Runtime in float32 on the same weights."""
    plugin = shared_plugin(shared_export, name, recipe)
    model = plugin.model
    num_layers, (layer, *_) = len(declared_experts(model)), declared_experts(model).values()
    kind = KINDS[recipe is not None]
    chosen = model.config.num_experts_per_tok
    for role, num_tokens in (("decode", 1), ("prefill", T)):
        graph = graph_of(plugin.path, role)
        found = expert_matmuls(graph)
        assert [(k, shape[0], picks) for k, shape, picks in found] == [
            (kind, layer.num_experts, chosen * num_tokens)
        ] * 2 * num_layers
        assert not others(graph)
        gates = [node for node in graph.node if node.op_type == "GatedActivation"]
        dense = [n for n in graph.node if any(a.name == "gate" and a.i for a in n.attribute)]  # in their matmuls
        assert len(gates) + len(dense) == (0 if name == "gpt_oss" else 2)  # that one's gate is its own
    onnx_bundle = shared_reference(shared_export, name, recipe)
    errors = errors_against(plugin.path, plugin.manifest, onnx_bundle, VOCAB_SIZE)
    assert max(errors) < 0.02
    # Of other matmuls the scales are float16, which tips some weights to the next code.
    assert np.median(errors) < (0.003 if recipe is None else 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [None, "int8-channel"])
def test_three_streams(recipe: str | None, tmp_path: Path) -> None:
    model, options = half_model("qwen3_moe"), {"batch": 3, "chunk_size": 1}
    manifest = plugin_bundle(tmp_path / "plugin", model, recipe, **options)
    assert [picks for *_, picks in expert_matmuls(graph_of(tmp_path / "plugin", "decode"))] == [6, 6]
    reference(tmp_path / "onnx", model, recipe, **options)
    under_test, errors = PluginBundle(tmp_path / "plugin", manifest), []
    with Session.load(tmp_path / "onnx") as session:
        for ids in random_ids(16, 3, seed=3):
            got, want = under_test.step(ids), session.step(ids)
            errors.append(np.linalg.norm(got - want) / np.linalg.norm(want))
    assert max(errors) < 0.02


@pytest.mark.slow
def test_more_tokens_than_a_node_takes(tmp_path: Path) -> None:
    """Several nodes read the same matrices: all experts would have to be read in the model's own form."""
    chosen, num_tokens = 3, 700
    taken = chosen * (MAX_PICKS // chosen)
    geometry = {"chunk_size": num_tokens, "window_size": num_tokens}
    model = half_model("qwen3_moe", num_experts_per_tok=chosen, max_position_embeddings=4 * num_tokens)
    manifest = plugin_bundle(tmp_path / "plugin", model, **geometry)
    graph = graph_of(tmp_path / "plugin", "prefill")
    assert [picks for *_, picks in expert_matmuls(graph)] == [taken, taken, *[chosen * num_tokens - taken] * 2]
    assert not others(graph)
    reference(tmp_path / "onnx", model, **geometry)
    assert max(errors_against(tmp_path / "plugin", manifest, tmp_path / "onnx", VOCAB_SIZE)) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_file_holds_them_once_by_rows_of_outputs(name: str, shared_export: SharedExports, tmp_path: Path) -> None:
    plugin = shared_plugin(shared_export, name)
    model = plugin.model
    exported(model, tmp_path / "onnx", dtype="fp16")
    sizes = {(folder / "weights.bin").stat().st_size for folder in (plugin.path, tmp_path / "onnx")}
    assert len(sizes) == 1
    read = {
        role: {n.input[1] for n in graph_of(plugin.path, role).node if n.op_type in KINDS}
        for role in ("decode", "prefill")
    }
    assert read["decode"] == read["prefill"]
    stored = {tensor.name: tensor for tensor in onnx.load(plugin.path / "decode.onnx").graph.initializer}
    for path, module in declared_experts(model).items():
        for weight in ("gate_up_proj", "down_proj"):
            want = getattr(module, weight).detach().numpy()
            want = want.transpose(0, 2, 1) if module.is_transposed else want
            np.testing.assert_array_equal(numpy_helper.to_array(stored[f"model.{path}.{weight}"]), want)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "bytes_of_expert"),
    [(None, 2 * 3 * 48 * 64), ("int8-channel", 3 * 48 * 64 + 4 * (2 * 64 + 48))],
)
def test_a_step_reads_what_is_chosen(recipe: str | None, bytes_of_expert: int, tmp_path: Path) -> None:
    """Three matrices of 48 x 64 an expert, in two layers; as many experts more as there are have rows in the router."""
    read = {}
    for count, chosen in ((8, 1), (8, 2), (16, 2)):
        folder = tmp_path / f"{count}-{chosen}"
        model = half_model("mixtral", num_local_experts=count, num_experts_per_tok=chosen)
        manifest = plugin_bundle(folder, model, recipe, chunk_size=1)
        read[count, chosen] = manifest.graphs["decode"].weight_bytes or 0
    assert abs(read[8, 2] - read[8, 1] - 2 * bytes_of_expert) < 200  # shapes are constants too
    assert read[16, 2] - read[8, 2] == 2 * 8 * 48 * 2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [None, "int8-channel"])
def test_matrices_that_the_kernels_do_not_take(recipe: str | None, tmp_path: Path) -> None:
    """INT8 ones have multiples of 16 inputs, float16 ones of 8; an MoE layer with others is computed as ever."""
    model = half_model("qwen3_moe", moe_intermediate_size=40)
    manifest = plugin_bundle(tmp_path / "40", model, recipe)
    for role in ("decode", "prefill"):
        graph = graph_of(tmp_path / "40", role)
        assert [kind for kind, *_ in expert_matmuls(graph)] == [KINDS[recipe is not None], KINDS[0]]
        assert not others(graph)
    if recipe is None:
        reference(tmp_path / "onnx", model)
        assert max(errors_against(tmp_path / "40", manifest, tmp_path / "onnx", VOCAB_SIZE)) < 0.02

    model = half_model("qwen3_moe", moe_intermediate_size=36, num_experts=12)
    manifest = plugin_bundle(tmp_path / "36", model, recipe)
    for role, kinds in (("decode", ["Gather"] * 2), ("prefill", ["MatMul"] * 2)):
        graph = graph_of(tmp_path / "36", role)
        assert not expert_matmuls(graph)
        assert others(graph) == kinds
    if recipe is None:
        reference(tmp_path / "onnx36", model)
        assert max(errors_against(tmp_path / "36", manifest, tmp_path / "onnx36", VOCAB_SIZE)) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "tensorrt"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_next"])
def test_smoothing_leaves_routers_and_experts_as_they_are(
    name: str, target: str, shared_export: SharedExports, tmp_path: Path
) -> None:
    """The experts beside which other matmuls read the same inputs, smoothed: a shared expert's, as a Gemm."""
    model, smooth = half_model(name), recipe()
    found = calibrate(LoadedModel(copy.deepcopy(model).float(), tiny_tokenizer(), "tiny"), smooth, TEXT)
    plain = shared_reference(shared_export, name)
    if target == "tensorrt":
        manifest = exported(model, tmp_path / "smooth", target=target, dtype="fp16", recipe=smooth, calibration=found)
        errors = errors_against(tmp_path / "smooth", manifest, plain, VOCAB_SIZE)
    else:
        exported(model.float(), tmp_path / "smooth", recipe=smooth, calibration=found)
        ids = random_ids(34, seed=1, first=0)
        with Session.load(tmp_path / "smooth") as one, Session.load(plain) as other:
            pairs = [(one.step([t]).copy(), other.step([t]).copy()) for t in ids]
        errors = np.array([np.linalg.norm(got - want) / np.linalg.norm(want) for got, want in pairs])
    assert np.median(errors) < 0.2  # inputs of 8 bits tip the choice of an expert now and then


@pytest.mark.slow
@pytest.mark.parametrize("config", [{"dtype": "fp32"}, {"dtype": "fp16", "native": True}], ids=str)
def test_graphs_of_float32_and_native_ones_have_no_such_nodes(config: dict[str, Any], tmp_path: Path) -> None:
    model = half_model("qwen3_moe", num_experts=12)
    model = model.float() if config["dtype"] == "fp32" else model
    exported(model, tmp_path, target="tensorrt", **config)
    for role, kinds in (("decode", ["Gather"] * 2), ("prefill", ["MatMul"] * 2)):
        graph = graph_of(tmp_path, role)
        assert not expert_matmuls(graph)
        assert others(graph) == kinds
