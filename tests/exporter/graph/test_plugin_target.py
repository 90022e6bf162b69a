"""Bundles for the TensorRT plugin: what the graphs say, what they compute, and that TensorRT-RTX builds them."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from sinkexport.config import WEIGHT_DTYPES, ExportConfig
from sinkexport.graph.passes.lower_to_opset17 import SAME
from sinkexport.pipeline.export import export
from sinkexport.quant.recipe import Recipe, load_recipe
from sinkexport.quant.weight import QuantizedWeight, WeightScheme
from sinkexport.sources import LoadedModel
from sinkexport.tensorrt.build_engines import build_bundle
from sinkexport.tensorrt.builder import float32_values
from sinkexport.tensorrt.options import BuildOptions
from sinkexport.tensorrt.process import EngineBuildError, build_engine_apart
from sinkrt import Session
from sinkrt.contract import MANIFEST_NAME, PLUGIN_ABI, Manifest, load_manifest
from sinkrt.engines import EngineHost, check_engine
from sinkrt.errors import BackendError, BundleError, UsageError

from tests.exporter.calibration.test_calibrate import TEXT, calibrate, recipe
from tests.exporter.graph.plugin_evaluator import PluginBundle, errors_against
from tests.exporter.graph.test_quantize import plain_steps, with_rounded_weights
from tests.exporter.tensorrt.test_builder import needs_tensorrt
from tests.exporter.tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer
from tests.exporter.variants.test_head_windows import window_file
from tests.plugins.trt_library import needs_plugin_build
from tests.real_model import smollm2_file
from tests.support import export_model, random_ids, run_cli

S, W, T = 3, 9, 4
GEOMETRY = {"num_sink_tokens": S, "window_size": W, "chunk_size": T}
NEEDS_BUILD = [needs_plugin_build, *needs_tensorrt]

EXPERTS_AND_LINEAR = ("mixtral", "qwen3_moe", "gpt_oss", "qwen3_next", "qwen3_5_text")
"""MoE families, and layers of linear attention, which have states of their own."""

# Heads of 64: what the kernels start at. Small weights, so that float16 inputs of attention cost little.
WIDE: dict[str, dict[str, Any]] = {
    "llama-tied": {"head_dim": 64},
    "gpt_neox": {"hidden_size": 128, "num_attention_heads": 2},
    "gemma2": {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 7},  # < S + W
    "llama-yarn": {"head_dim": 64},
    "phi3": {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
    "qwen2": {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
    **{name: {"head_dim": 64} for name in EXPERTS_AND_LINEAR},
    "mimo_v2_flash": {"head_dim": 80, "v_head_dim": 64},
    "gemma3n_text": {"head_dim": 64},
    **{name: {"head_dim": 64} for name in ("diffllama", "falcon_h1", "recurrent_gemma", "zaya")},
    "deepseek_v3": {"qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 64},
    "kimi_linear": {"qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 64},
}
FURTHER = ("mimo_v2_flash", "gemma3n_text", "diffllama", "deepseek_v3", "falcon_h1", "zaya", "kimi_linear")
"""Values smaller than keys, shared caches, two attentions a layer, latents, recurrent layers."""


def wide_model(name: str, dtype: str = "fp32") -> Any:
    model = tiny_model(name, **WIDE[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.4)
    return model.to(getattr(torch, WEIGHT_DTYPES[dtype]))


def exported(model: Any, folder: Path, **config: Any) -> Manifest:
    geometry = {**GEOMETRY, **config}
    return export_model(model, folder, **geometry).manifest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama-tied", {}),
        ("llama-tied", {"recipe": "int8-channel", "kv": "int8"}),
        ("gpt_neox", {"kv": "int8"}),
        ("gemma2", {"num_sink_tokens": 0}),
        ("llama-yarn", {}),
        ("llama-tied", {"budgets": window_file("llama-tied", ((9, 5), (4, 9)))}),
        ("llama-tied", {"dtype": "fp16"}),
        ("gpt_neox", {"dtype": "fp16"}),  # biases
        *((name, {}) for name in EXPERTS_AND_LINEAR if name != "qwen3_next"),
        ("qwen3_next", {"dtype": "fp16"}),
        ("qwen3_5_text", {"recipe": "int8-channel"}),
        *((name, {}) for name in FURTHER),
        ("recurrent_gemma", {"num_sink_tokens": 0}),
    ],
    ids=str,
)
def test_the_plugins_graph_computes_what_the_onnx_bundle_does(name: str, config: dict, tmp_path: Path) -> None:
    """Chunks first, then steps past two wraps. Attention's inputs are rounded to float16 for the plugin."""
    options = {**config, "recipe": load_recipe(config["recipe"])} if "recipe" in config else config
    dtype = config.get("dtype", "fp32")
    manifest = exported(wide_model(name, dtype), tmp_path / "plugin", target="tensorrt", **options)
    plain = wide_model(name, dtype) if "recipe" not in config else with_rounded_weights(wide_model(name, dtype))
    exported(plain, tmp_path / "onnx", **{key: value for key, value in config.items() if key != "recipe"})
    errors = errors_against(tmp_path / "plugin", manifest, tmp_path / "onnx", VOCAB_SIZE)
    assert max(errors) < 0.01
    assert np.median(errors) < 0.004


def with_int4_weights(model: Any, recipe: Recipe) -> Any:
    """Every matrix rounded as a recipe of INT4 weights says, in place; a tied table as the output projection."""
    head, weights = model.get_output_embeddings(), recipe.weights
    assert weights is not None
    assert head.weight is model.get_input_embeddings().weight
    int4 = WeightScheme(4, weights.block_size, weights.symmetric, "absmax", "float16")
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            scheme = WeightScheme(8) if module is head and recipe.lm_head == "int8" else int4
            rounded = QuantizedWeight("w", ir.tensor(module.weight.detach().numpy()), scheme, transposed=True)
            module.weight.data.copy_(torch.from_numpy(rounded.dequantized()))
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "lm_head", "kinds"),
    [
        ({}, "int8", {"Int4Linear", "Int8Linear", "Int8Rows"}),
        ({"block_size": 64, "symmetric": True}, "same", {"Int4Linear", "Int4Rows"}),
    ],
    ids=["int4-nearest", "table, symmetric"],
)
def test_int4_weights_are_the_rounded_models(weights: dict, lm_head: str, kinds: set[str], tmp_path: Path) -> None:
    asked = load_recipe("int4-nearest")
    assert asked.weights is not None
    asked = asked.model_copy(update={"weights": asked.weights.model_copy(update=weights), "lm_head": lm_head})
    manifest = exported(wide_model("llama-tied"), tmp_path / "plugin", target="tensorrt", recipe=asked)
    assert manifest.quantization is not None
    assert manifest.quantization.weights == "int4"
    for role in ("decode", "prefill"):
        assert kinds == {kind for kind in plugin_nodes(tmp_path / "plugin", role) if kind.startswith("Int")}
    exported(with_int4_weights(wide_model("llama-tied"), asked), tmp_path / "onnx")
    errors = errors_against(tmp_path / "plugin", manifest, tmp_path / "onnx", VOCAB_SIZE)
    assert max(errors) < 0.01
    assert np.median(errors) < 0.004


def test_int4_weights_need_the_plugin() -> None:
    with pytest.raises(UsageError, match="received INT4 weights and --native, expected 8 bits"):
        ExportConfig(recipe=load_recipe("int4-nearest"), target="tensorrt", native=True)


def with_smooth(folder: Path, **config: Any) -> Manifest:
    """A bundle whose matmuls have INT8 inputs with static ranges."""
    asked, model = recipe(), wide_model("llama-tied")
    found = calibrate(LoadedModel(model, tiny_tokenizer(), "tiny"), asked, TEXT)
    return exported(
        model, folder, **{"num_sink_tokens": 2, "target": "tensorrt", **config}, recipe=asked, calibration=found
    )


@pytest.mark.slow
def test_static_inputs_compute_what_the_native_bundle_does(tmp_path: Path) -> None:
    manifest = with_smooth(tmp_path / "plugin")
    with_smooth(tmp_path / "native", native=True)
    ids = random_ids(24, seed=2, first=0)
    under_test = PluginBundle(tmp_path / "plugin", manifest)
    step = plain_steps(tmp_path / "native" / "decode.onnx")
    errors = []
    for t in range(len(ids)):
        got, want = under_test.step(ids[t : t + 1]), step(ids[t : t + 1], t)
        errors.append(np.linalg.norm(got - want) / np.linalg.norm(want))
    assert np.median(errors) < 0.03  # float16 inputs of attention tip some values to the next code


@pytest.mark.parametrize("name", ["phi3", "gpt_neox"])
def test_what_tensorrt_8_is_given(name: str, tmp_path: Path) -> None:
    """Opset 17, operators that its parser has, and nothing of 64 bits that goes in or out."""
    manifest = exported(wide_model(name, "fp16"), tmp_path / "b", target="tensorrt", dtype="fp16", batch=2)
    assert manifest.plugin_abi == PLUGIN_ABI
    specs = {role: [(s.name, s.shape, s.dtype) for s in graph.inputs] for role, graph in manifest.graphs.items()}
    assert specs["decode"] == [("ids", (2, 1), "int32"), ("position", (2, 2), "int32")]
    assert specs["prefill"] == [("ids", (1, T), "int32"), ("position", (1, 2), "int32"), ("num_valid", (1,), "int32")]
    for graph in manifest.graphs.values():
        model = onnx.load(tmp_path / "b" / graph.file, load_external_data=False)
        assert {opset.domain: opset.version for opset in model.opset_import} == {"": 17, "ai.sinkexport": 1}
        assert model.ir_version == 8
        kinds = {node.op_type for node in model.graph.node}
        assert "SinkAttention" in kinds
        assert kinds <= SAME | {"SinkAttention", "HalfLinear", "RmsNorm", "GatedActivation", "Split", "ReduceMean"}
        assert ("ReduceMean" in kinds) == (name == "gpt_neox")
        for value in [*model.graph.input, *model.graph.output]:
            assert value.type.tensor_type.elem_type != onnx.TensorProto.INT64
        held = float32_values(tmp_path / "b" / graph.file)  # what TensorRT 8 may not lower to float16
        assert "logits" in held
        assert {node.output[0] for node in model.graph.node if node.op_type == "ReduceMean"} <= held
        matmuls = {node.output[0] for node in model.graph.node if node.op_type == "HalfLinear"}
        assert len(matmuls) == 9
        assert not matmuls & held
        attentions = [node for node in model.graph.node if node.op_type == "SinkAttention"]
        assert len(attentions) == 2
        assert {a.name: a.s for a in attentions[0].attribute if a.name.startswith("plugin_")} == {
            "plugin_version": b"1",
            "plugin_namespace": b"",
        }


def plugin_nodes(folder: Path, role: str) -> list[str]:
    """Kinds of the graph's nodes that are the plugin's."""
    graph = onnx.load(folder / f"{role}.onnx", load_external_data=False).graph
    return [node.op_type for node in graph.node if node.domain == "ai.sinkexport"]


def operators(folder: Path, role: str = "decode") -> list[tuple[str, str]]:
    """Kind and name of the matrix of every matmul of a graph."""
    kinds = ("MatMul", "Gemm", "HalfLinear", "Int4Linear", "Int8Linear")
    model = onnx.load(folder / f"{role}.onnx", load_external_data=False)
    return [(node.op_type, node.input[1]) for node in model.graph.node if node.op_type in kinds]


@pytest.mark.slow
def test_products_by_float16_weights_are_plugins(tmp_path: Path) -> None:
    """All of them, in both graphs, by weights that the file holds once, in the model's own orientation."""
    model = wide_model("llama-tied", "fp16")
    exported(model, tmp_path / "plugin", target="tensorrt", dtype="fp16")
    exported(model, tmp_path / "onnx", dtype="fp16")
    for role in ("decode", "prefill"):
        found = operators(tmp_path / "plugin", role)
        assert [kind for kind, _ in found] == ["HalfLinear"] * 9
        assert found == operators(tmp_path / "plugin")
    sizes = {(tmp_path / name / "weights.bin").stat().st_size for name in ("plugin", "onnx")}
    assert len(sizes) == 1
    graph = onnx.load(tmp_path / "plugin" / "decode.onnx").graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state = model.state_dict()
    for name in ("layers.1.self_attn.o_proj.weight", "layers.0.mlp.down_proj.weight"):
        np.testing.assert_array_equal(stored[f"model.model.{name}"], state[f"model.{name}"].numpy())
    table = next(node.input[0] for node in graph.node if node.op_type == "Gather" and node.input[1] == "ids")
    assert table == found[-1][1]  # tied to the output projection
    assert not {name for name in stored if name.endswith(".T")}


@pytest.mark.slow
def test_products_that_the_kernel_does_not_take_stay(tmp_path: Path) -> None:
    odd = tiny_model("llama-tied", head_dim=64, intermediate_size=60).to(torch.float16)
    exported(odd, tmp_path / "odd", target="tensorrt", dtype="fp16", chunk_size=1)
    assert [kind for kind, _ in operators(tmp_path / "odd")] == [*["HalfLinear"] * 3, "MatMul"] * 2 + ["HalfLinear"]
    exported(wide_model("llama-tied"), tmp_path / "fp32", target="tensorrt", chunk_size=1)
    exported(
        wide_model("llama-tied", "fp16"),
        tmp_path / "native",
        target="tensorrt",
        dtype="fp16",
        chunk_size=1,
        native=True,
    )
    for name in ("fp32", "native"):
        assert {kind for kind, _ in operators(tmp_path / name)} == {"MatMul", "Gemm"}


def test_products_that_a_recipe_keeps_are_plugins(tmp_path: Path) -> None:
    kept = load_recipe("int8-channel").model_copy(update={"lm_head": "float", "keep_float": ("*.down_proj",)})
    exported(wide_model("llama-tied", "fp16"), tmp_path / "b", target="tensorrt", dtype="fp16", recipe=kept)
    expected = [*["Int8Linear"] * 3, "HalfLinear"] * 2 + ["HalfLinear"]
    for role in ("decode", "prefill"):
        assert [kind for kind, _ in operators(tmp_path / "b", role)] == expected


def test_states_of_a_float32_bundle_are_float16(tmp_path: Path) -> None:
    manifest = exported(wide_model("qwen2"), tmp_path / "b", target="tensorrt", chunk_size=1)
    assert {state.dtype for state in manifest.states} == {"float16"}
    assert manifest.weights_dtype == "float32"


def test_what_the_plugin_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="head size: received 16, expected one that the plugin has kernels for"):
        exported(tiny_model("llama"), tmp_path / "b", target="tensorrt")
    with pytest.raises(UsageError, match="batch: received 65, expected at most 64"):
        exported(wide_model("llama-tied"), tmp_path / "b", target="tensorrt", batch=65)
    with pytest.raises(UsageError, match="received 65537 tokens, expected at most 65536"):
        exported(wide_model("llama-tied"), tmp_path / "b", target="tensorrt", window_size=65534)
    with pytest.raises(UsageError, match="native: received target auto"):
        ExportConfig(native=True)
    assert not (tmp_path / "b").exists()


class TestBuilding:
    pytestmark = NEEDS_BUILD

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("dtype", "config"),
        [
            ("fp16", {"kv": "int8"}),
            ("fp16", {"recipe": "int8-channel", "batch": 2}),
            ("fp16", {"recipe": "int4-nearest"}),
            ("fp32", {"num_sink_tokens": 0}),
            ("fp32", {"native": True}),
        ],
        ids=str,
    )
    def test_tiny_bundles_build(self, dtype: str, config: dict, plugin_library: Path, tmp_path: Path) -> None:
        options = {**config, "recipe": load_recipe(config["recipe"])} if "recipe" in config else config
        exported(wide_model("llama-tied", dtype), tmp_path / "b", dtype=dtype, target="tensorrt", **options)
        native = config.get("native", False)
        built = build_bundle(tmp_path / "b", BuildOptions(None if native else plugin_library))
        assert sorted(built) == ["decode", "prefill"]
        for role, (facts, report) in built.items():
            nodes = plugin_nodes(tmp_path / "b", role)
            assert report.layer_types.get("PLUGIN_V3", 0) == len(nodes)
            assert native or len(nodes) >= 2
            assert native or (dtype == "fp16") == any("Linear" in node for node in nodes)
            assert (tmp_path / "b" / facts.file).stat().st_size == facts.bytes == report.engine_bytes
        written = sorted(path.name for path in (tmp_path / "b" / "engines").iterdir())
        plugin = [] if native else ["libsinkexport_plugin.so"]  # a session looks for it beside the engines
        assert written == ["decode.engine", *plugin, "prefill.engine"]
        manifest = load_manifest(tmp_path / "b")
        assert manifest.engines == {role: facts for role, (facts, _) in built.items()}

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "recipe"), [*((name, None) for name in EXPERTS_AND_LINEAR), ("gpt_oss", "int8-channel")]
    )
    def test_experts_and_linear_attention_build(
        self, name: str, recipe: str | None, plugin_library: Path, tmp_path: Path
    ) -> None:
        options = {} if recipe is None else {"recipe": load_recipe(recipe)}
        exported(wide_model(name, "fp16"), tmp_path / "b", dtype="fp16", target="tensorrt", **options)
        for role, (_, report) in build_bundle(tmp_path / "b", BuildOptions(plugin_library)).items():
            nodes = plugin_nodes(tmp_path / "b", role)
            assert "SinkAttention" in nodes
            assert report.layer_types["PLUGIN_V3"] == len(nodes)

    @pytest.mark.slow
    def test_static_inputs_build(self, plugin_library: Path, tmp_path: Path) -> None:
        with_smooth(tmp_path / "b", chunk_size=1)
        _, report = build_bundle(tmp_path / "b", BuildOptions(plugin_library))["decode"]
        assert report.layer_types["QUANTIZE"] >= 6
        assert report.layer_types["PLUGIN_V3"] >= 2

    @pytest.mark.slow
    def test_smollm2_builds(self, plugin_library: Path, tmp_path: Path) -> None:
        config = ExportConfig(chunk_size=1, dtype="fp16", kv="int8", target="tensorrt")
        export(str(smollm2_file()), tmp_path / "b", config)
        facts, report = build_bundle(tmp_path / "b", BuildOptions(plugin_library))["decode"]
        assert report.layer_types["PLUGIN_V3"] == 30 + 4 * 30 + 1  # attention, matmuls with norms and gates, lm_head
        assert facts.precision == "float16"
        assert facts.bytes > 260e6  # 135 M parameters

    @pytest.mark.slow
    def test_the_command(self, plugin_library: Path, tmp_path: Path) -> None:
        exported(wide_model("llama-tied", "fp16"), tmp_path / "b", dtype="fp16", target="tensorrt", chunk_size=1)
        result = run_cli("build", tmp_path / "b", "--plugin", plugin_library, "--tactic-sources", "0")
        result.succeeded()
        assert "decode.engine: decode, TensorRT-RTX" in result.out
        with pytest.raises(BackendError, match="a bundle whose graphs need the TensorRT plugin"):
            Session.load(tmp_path / "b")
        shown = run_cli("inspect", tmp_path / "b")
        assert f"plugin {PLUGIN_ABI}" in shown.out
        assert "engines/decode.engine" in shown.out

    @pytest.mark.slow
    def test_a_graph_that_does_not_fit_its_fields_is_refused(self, plugin_library: Path, tmp_path: Path) -> None:
        exported(wide_model("llama-tied", "fp16"), tmp_path / "b", dtype="fp16", target="tensorrt", chunk_size=1)
        model = onnx.load(tmp_path / "b" / "decode.onnx", load_external_data=False)
        node = next(node for node in model.graph.node if node.op_type == "SinkAttention")
        next(a for a in node.attribute if a.name == "num_sinks").i = 0  # its inputs still have sinks
        onnx.save(model, tmp_path / "b" / "decode.onnx")
        with pytest.raises(BackendError, match="SinkAttention") as caught:
            build_engine_apart(tmp_path / "b" / "decode.onnx", tmp_path / "x.engine", BuildOptions(plugin_library))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "x.engine").exists()


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import os; os.abort()", r"a crash of TensorRT \(signal 6"),
        ("import sys; print('said this', file=sys.stderr); sys.exit(3)", r"exit code 3; said this\)"),
        ("print('{}')", r"exit code 0"),
    ],
)
def test_a_crash_of_tensorrt_is_reported_in_one_line(code: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(EngineBuildError, match=problem) as caught:
        build_engine_apart(tmp_path / "g.onnx", tmp_path / "e", BuildOptions(), command=(sys.executable, "-c", code))
    assert "\n" not in str(caught.value)


def test_a_crash_ends_the_command_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported(wide_model("llama-tied"), tmp_path / "b", target="tensorrt", native=True, chunk_size=1)
    before = (tmp_path / "b" / MANIFEST_NAME).read_bytes()
    package = tmp_path / "packages" / "tensorrt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import os; os.abort()", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=os.pathsep)
    run_cli("build", tmp_path / "b").refusal("engine of 'decode.onnx': received a crash of TensorRT (signal 6", code=1)
    assert (tmp_path / "b" / MANIFEST_NAME).read_bytes() == before


def test_bad_input_of_the_command(tmp_path: Path) -> None:
    exported(wide_model("qwen2"), tmp_path / "plugin", target="tensorrt", chunk_size=1)
    exported(wide_model("qwen2"), tmp_path / "onnx", chunk_size=1)
    plugin, text = str(tmp_path / "plugin"), tmp_path / "text.so"
    text.write_text("no library")
    for arguments, problem in (
        ([str(tmp_path / "onnx")], "exported for target onnx, expected target tensorrt"),
        ([str(tmp_path / "none")], "manifest.json: received no readable file"),
        ([plugin], "--plugin: received nothing"),
        ([plugin, "--plugin", str(tmp_path / "no.so")], "--plugin: received no file at"),
        ([plugin, "--plugin", str(text), "--timing-cache", str(tmp_path)], "--timing-cache: received"),
    ):
        result = run_cli("build", *arguments)
        result.refusal(problem)
    for bits in ("-1", "4294967296", "cublas"):
        result = run_cli("build", plugin, "--tactic-sources", bits)
        assert result.code == 2
        assert "--tactic-sources" in result.err


def with_engine(bundle: Path, **changes: Any) -> Manifest:
    """The manifest of a bundle with one engine of 6 bytes."""
    manifest = load_manifest(bundle)
    (bundle / "engines").mkdir(exist_ok=True)
    (bundle / "engines" / "decode.engine").write_bytes(b"engine")
    facts = {
        "file": "engines/decode.engine",
        "bytes": 6,
        "sha256": "c2594c2bec5d1d8c6bc9a7dd7b7ee7cc34e3d9b1d1f22a4ae9e7b0f1e1f3a5d1",
        "graph_sha256": manifest.files["decode.onnx"].sha256,
        "flavour": "TensorRT",
        "version": "10.14.1.48",
        "plugin_abi": "1",
        "gpu": "NVIDIA L4",
        "compute_capability": "8.9",
        "precision": "float16",
        **changes,
    }
    raw = json.loads(manifest.to_json())
    return Manifest.from_json(json.dumps({**raw, "engines": {"decode": facts}}))


def test_a_bundle_of_another_plugin_abi_is_not_built(tmp_path: Path) -> None:
    exported(wide_model("qwen2"), tmp_path / "b", target="tensorrt", chunk_size=1)
    manifest = tmp_path / "b" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "plugin_abi": "4"}))
    with pytest.raises(UsageError, match="plugin ABI 4, expected plugin ABI 5; export the model again"):
        build_bundle(tmp_path / "b", BuildOptions(tmp_path / "plugin.so"))


def test_an_engine_that_does_not_fit_is_refused_with_the_reason(tmp_path: Path) -> None:
    import hashlib

    bundle, digest = tmp_path / "b", hashlib.sha256(b"engine").hexdigest()
    exported(wide_model("qwen2"), bundle, target="tensorrt", chunk_size=1)
    host = EngineHost("TensorRT", "10.14.1.48", "1", "8.9")
    good = with_engine(bundle, sha256=digest)
    assert check_engine(bundle, good, "decode", host) == bundle / "engines" / "decode.engine"
    # The C++ library has no build number of its own.
    assert check_engine(bundle, good, "decode", dataclasses.replace(host, version="10.14.1"))
    anywhere = with_engine(bundle, sha256=digest, gpu=None, compute_capability=None, plugin_abi=None)
    assert check_engine(bundle, anywhere, "decode", dataclasses.replace(host, compute_capability="12.0"))
    for changes, problem in (
        ({"flavour": "TensorRT-RTX"}, "flavour: received one that was built for TensorRT, expected TensorRT-RTX"),
        ({"version": "11.1.0"}, "version: received one that was built for 10.14.1, expected 11.1.0"),
        ({"plugin_abi": "2"}, "plugin ABI: received one that was built for 1, expected 2"),
        ({"plugin_abi": None}, "plugin ABI: received one that was built for 1, expected None"),
        ({"compute_capability": "9.0"}, "compute capability: received one that was built for 8.9, expected 9.0"),
    ):
        with pytest.raises(BackendError, match=problem):
            check_engine(bundle, good, "decode", dataclasses.replace(host, **changes))
    for changes, problem in (
        ({"graph_sha256": "0" * 64}, "its graph: received one that was built for 000000000000"),
        ({"bytes": 7}, "received 6 bytes, expected 7 bytes"),
        ({}, "received other content"),
    ):
        with pytest.raises(BackendError, match=problem):
            check_engine(bundle, with_engine(bundle, **changes), "decode", host)
    with pytest.raises(BackendError, match="decode engine: received none"):
        check_engine(bundle, load_manifest(bundle), "decode", host)
    (bundle / "engines" / "decode.engine").unlink()
    with pytest.raises(BackendError, match="received no such file"):
        check_engine(bundle, good, "decode", host)


def test_manifests_without_engines_are_still_read_and_bad_ones_are_not(tmp_path: Path) -> None:
    exported(wide_model("qwen2"), tmp_path / "b", chunk_size=1)
    raw = json.loads((tmp_path / "b" / MANIFEST_NAME).read_text())
    for key in ("engines", "plugin_abi"):
        assert raw.pop(key) is None
    raw["schema_version"] = 2
    old = Manifest.from_json(json.dumps(raw))
    assert (old.engines, old.plugin_abi) == (None, None)
    for changes in ({"file": "../x"}, {"flavour": "TRT"}, {"sha256": "x"}, {"precision": "int8"}):
        with pytest.raises(BundleError):
            with_engine(tmp_path / "b", **changes)
