"""Quantised matmuls and tables, alone and in whole bundles, against NumPy and onnxruntime's own quantiser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx_ir.passes import common
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits
from sinkexport.config import ExportConfig
from sinkexport.evaluation.parity import verify
from sinkexport.graph.matmuls import Matmul
from sinkexport.graph.quantize.ort import OrtForm, block_size, packed, packed_zeros
from sinkexport.graph.quantize.plan import InputScale
from sinkexport.graph.quantize.plugin import PluginForm
from sinkexport.graph.quantize.qdq import QdqForm
from sinkexport.quant.ranges import InputRange
from sinkexport.quant.recipe import Recipe, load_recipe, parse_recipe
from sinkexport.quant.weight import QuantizedWeight, WeightScheme
from sinkexport.sources import LoadedModel
from sinkexport.tensorrt.builder import build_engine
from sinkrt import Session
from sinkrt.errors import UsageError

from tests.exporter.quant.test_weight import unpacked
from tests.exporter.tensorrt.test_builder import needs_tensorrt
from tests.exporter.tiny_models import tiny_model
from tests.support import SharedExports, export_model, nightly_but, random_ids

FORMS = {"ort": OrtForm, "qdq": QdqForm, "plugin": PluginForm}


def make_weight(rng: np.random.Generator, num_outputs: int, depth: int, scheme: WeightScheme) -> QuantizedWeight:
    source = rng.standard_normal((num_outputs, depth)).astype(np.float32)
    return QuantizedWeight("w", ir.Tensor(source, name="w"), scheme, transposed=True)


class OneMatmul:
    """A graph of x [B, T, K] @ W that a form rewrites; inputs x and position."""

    def __init__(self, form: str, weight: QuantizedWeight, batch: int, num_tokens: int, num_sinks: int = 0) -> None:
        shape = (batch, num_tokens, weight.num_inputs)
        x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        position = ir.Value(name="position", shape=ir.Shape([batch]), type=ir.TensorType(ir.DataType.INT64))
        matrix = ir.Value(
            name="w.T",
            shape=ir.Shape((weight.num_inputs, weight.num_outputs)),
            type=ir.TensorType(ir.DataType.FLOAT),
            const_value=ir.Tensor(weight.source.numpy().T.copy(), name="w.T"),
        )
        node = ir.node("MatMul", [x, matrix])
        out = node.outputs[0]
        out.shape = ir.Shape((batch, num_tokens, weight.num_outputs))
        out.dtype, out.name = ir.DataType.FLOAT, "y"
        graph = ir.Graph([x, position], [out], nodes=[node], initializers=[matrix], opset_imports={"": 24})
        self.graph = graph
        self.for_ort = form == "ort"
        self.matmul = Matmul(node, matrix, (("w", weight.source),), False)
        self.form = FORMS[form](graph, position, num_sinks)

    def run(self, x: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Run the graph without fusions. Q/DQ is for TensorRT: ONNX Runtime's fusions saturate without VNNI."""
        self.graph.initializers.pop("w.T", None)
        options = ort.SessionOptions()
        if not self.for_ort:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        model = ir.Model(self.graph, ir_version=11)
        common.NameFixPass()(model)
        session = ort.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        given = {i.name: {"x": x, "position": position}[i.name] for i in session.get_inputs()}
        return session.run(None, given)[0]


def rounded_rows(x: np.ndarray) -> np.ndarray:
    """DynamicQuantizeLinear's rounding of each row by itself, in float64: what the row stands for afterwards."""
    low, high = np.minimum(x.min(-1, keepdims=True), 0.0), np.maximum(x.max(-1, keepdims=True), 0.0)
    scale = (high - low) / 255.0
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, True), (4, False), (8, False)])
@pytest.mark.parametrize(("depth", "block"), [(64, 32), (96, 32), (80, 32), (128, 64), (64, 16)])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_weight_only_products(bits: Any, symmetric: bool, depth: int, block: int, num_tokens: int) -> None:
    rng = np.random.default_rng(bits + depth)
    weight = make_weight(rng, 24, depth, WeightScheme(bits, block, symmetric))
    one = OneMatmul("ort", weight, 2, num_tokens)
    one.form.weight_only(one.matmul, weight)
    x = rng.standard_normal((2, num_tokens, depth)).astype(np.float32)
    want = x.astype(np.float64) @ weight.dequantized().T.astype(np.float64)
    got = one.run(x, np.zeros(2, np.int64))
    # What is left is the kernel's rounding of x to 8 bits in each block: half a step of each number at most.
    blocks = [slice(start, start + block) for start in range(0, depth, block)]
    half = np.concatenate(
        [np.abs(x[..., b]).max(-1, keepdims=True).repeat(len(range(depth)[b]), -1) / 254 for b in blocks], axis=-1
    )
    assert (np.abs(got - want) <= 1.02 * half @ np.abs(weight.dequantized()).T + 1e-5).all()
    exact = x.astype(np.float64) @ weight.source.numpy().T
    assert np.abs(got - exact).max() > 0.0


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packing_is_that_of_onnxruntimes_quantiser(bits: Any, symmetric: bool) -> None:
    """Given onnxruntime's own numbers, `packed` lays out bytes as its quantiser does."""
    rng, depth, num_outputs, block = np.random.default_rng(3), 96, 10, 32
    source = rng.standard_normal((depth, num_outputs)).astype(np.float32)
    groups = depth // block
    theirs = np.zeros((num_outputs, groups, block * bits // 8), np.uint8)
    scales = np.zeros((num_outputs, groups), np.float32)
    zeros = np.zeros((num_outputs, -(-groups * bits // 8)), np.uint8)
    quantise = quantize_matmul_8bits if bits == 8 else quantize_matmul_4bits
    quantise(theirs, source, scales, zeros, block, num_outputs, depth, symmetric)

    class Theirs(QuantizedWeight):
        def integers(self) -> np.ndarray:
            codes = unpacked(theirs, bits).reshape(num_outputs, depth)
            return (codes.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8) if symmetric else codes

        def zero_points(self) -> np.ndarray | None:
            return None if symmetric else unpacked(zeros, bits)[:, :groups]

    weight = Theirs("w", ir.Tensor(source.T.copy(), name="w"), WeightScheme(bits, block, symmetric), transposed=True)
    np.testing.assert_array_equal(packed(weight), theirs)
    if not symmetric:
        np.testing.assert_array_equal(packed_zeros(weight), zeros)


@pytest.mark.parametrize(("batch", "num_tokens"), [(1, 1), (2, 1), (1, 7), (3, 4)])
def test_dynamic_products_round_every_token_by_itself(batch: int, num_tokens: int) -> None:
    rng, depth = np.random.default_rng(batch + num_tokens), 48
    weight = make_weight(rng, 20, depth, WeightScheme(8))
    one = OneMatmul("ort", weight, batch, num_tokens)
    one.form.dynamic(one.matmul, weight)
    x = rng.standard_normal((batch, num_tokens, depth)).astype(np.float32)
    x[0, 0] *= 1000  # a massive token must not cost the others their precision
    want = rounded_rows(x.astype(np.float64)) @ weight.dequantized().T
    got = one.run(x, np.zeros(batch, np.int64))
    row = np.abs(want).max(axis=-1, keepdims=True)
    assert (np.abs(got - want) / row).max() < 1e-5


def test_a_token_of_zeros_is_no_trouble() -> None:
    weight = make_weight(np.random.default_rng(0), 8, 32, WeightScheme(8))
    one = OneMatmul("ort", weight, 1, 3)
    one.form.dynamic(one.matmul, weight)
    assert not one.run(np.zeros((1, 3, 32), np.float32), np.zeros(1, np.int64)).any()


@pytest.mark.parametrize("form", ["ort", "qdq", "plugin"])
@pytest.mark.parametrize(("batch", "num_tokens"), [(1, 1), (2, 1), (1, 6), (2, 3)])
@pytest.mark.parametrize("sinks", [None, 4.0])
def test_static_products_keep_the_sinks_apart(form: str, batch: int, num_tokens: int, sinks: float | None) -> None:
    rng, depth, num_sinks = np.random.default_rng(batch), 48, 2
    weight = make_weight(rng, 20, depth, WeightScheme(8))
    scale = InputScale(3.0 / 127, None if sinks is None else sinks * 100 / 127)
    x = rng.standard_normal((batch, num_tokens, depth)).astype(np.float32).clip(-3, 3)
    for first in (0, 1, 2, 9):
        one = OneMatmul(form, weight, batch, num_tokens, num_sinks)
        one.form.static(one.matmul, weight, scale)
        position = first + np.arange(batch)
        tokens = position[:, None] + np.arange(num_tokens)  # [B, T]
        is_sink = (tokens < num_sinks)[..., None]
        given = np.where(is_sink, x * 100, x).astype(np.float32)
        step = np.where(is_sink & (sinks is not None), scale.sinks or 0.0, scale.rest).astype(np.float64)
        rounded = np.clip(np.rint(given / step), -128, 127) * step
        want = rounded @ weight.dequantized().T
        got = one.run(given, position)
        row = np.abs(want).max(axis=-1, keepdims=True) + 1e-6
        # A value that lies between two codes may go either way: one step of one input at most.
        allowed = 1e-5 + 1.01 * step * np.abs(weight.dequantized()).max() / row
        assert (np.abs(got - want) / row <= allowed).all(), first


GEOMETRY = {"num_sink_tokens": 2, "window_size": 6, "chunk_size": 3}


def exported(model: Any, folder: Path, recipe: Recipe | None, **geometry: Any) -> Session:
    config = ExportConfig(**{**GEOMETRY, "recipe": recipe, **geometry})
    export_model(model, folder, config)
    return Session.load(folder, threads=1)


def with_rounded_weights(model: Any) -> Any:
    """Every matrix rounded to 8 bits with a scale for each row, in place, in torch."""
    seen: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if weight is not None and weight.ndim == 2 and id(weight) not in seen:
                seen.add(id(weight))
                scale = weight.abs().amax(dim=1, keepdim=True) / 127
                weight.copy_((weight / scale).round() * scale)
    return model


def plain_steps(graph: Path) -> Callable[[np.ndarray, int], np.ndarray]:
    """A decode graph as ONNX Runtime runs it without its optimiser: (ids [B], position) -> logits [B, vocab]."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    states = {i.name: np.zeros(i.shape, np.float32) for i in session.get_inputs() if "." in i.name}

    def step(ids: np.ndarray, position: int) -> np.ndarray:
        logits, *after = session.run(None, {"ids": ids[:, None], "position": np.full(len(ids), position), **states})
        states.update(zip(states, after, strict=True))
        return logits

    return step


@pytest.mark.parametrize(
    "name", nightly_but(["llama", "phi3"], ["llama", "llama-tied", "gpt_neox", "gemma2", "phi3", "cohere"])
)
def test_a_tensorrt_bundle_with_int8_weights_is_the_model_with_rounded_weights(name: str, tmp_path: Path) -> None:
    """Q/DQ graphs say floating-point arithmetic, so the rounded weights are all that differs.

    Left to itself, ONNX Runtime makes INT8 matmuls of them, which round their inputs as well: a session forbids that.
    """
    recipe = load_recipe("int8-channel")
    with (
        exported(
            tiny_model(name), tmp_path / "q", recipe, target="tensorrt", native=True, batch=2, chunk_size=1
        ) as session,
        exported(with_rounded_weights(tiny_model(name)), tmp_path / "f", None, batch=2, chunk_size=1) as rounded,
    ):
        for ids in random_ids(2, 20).T:
            got, want = session.step(ids), rounded.step(ids)
            assert np.abs(got - want).max() < 1e-4 * want.std()


RECIPES = ("int8-weights", "int8-dynamic", "int4-nearest")
STEPPED = [
    *((1, "llama", recipe) for recipe in RECIPES),
    *((2, "gpt_neox", recipe) for recipe in RECIPES),
    (2, "llama-tied", "int8-weights"),
    (2, "gemma2", "int8-dynamic"),
]


@pytest.mark.parametrize(
    ("batch", "name", "recipe"),
    nightly_but(
        STEPPED,
        [
            (batch, name, recipe)
            for batch in (2, 1)
            for name in ("llama", "llama-tied", "gpt_neox", "phi", "gemma2", "qwen2")
            for recipe in RECIPES
        ],
    ),
)
def test_prefill_gives_what_steps_give(batch: int, name: str, recipe: str, tmp_path: Path) -> None:
    with exported(tiny_model(name), tmp_path / "b", load_recipe(recipe), batch=batch) as session:
        ids = random_ids(batch, 23)
        steps = [session.step(column).copy() for column in ids.T]
        session.reset()
        for start, end in ((0, 1), (1, 6), (6, 7), (7, 23)):
            got = session.prefill(ids[:, start:end])
            # A number between two codes may be rounded either way: see the sharp softmax of tiny random models. INT4's
            # kernel comes to 2.2e-2 in one of these cases on a processor without VNNI.
            difference = np.abs(got - steps[end - 1])
            assert difference.max() < (3e-2 if recipe == "int4-nearest" else 2e-2) * got.std()
            assert difference.mean() < 1e-2 * got.std()


@pytest.mark.slow
def test_float16_bundles_take_recipes_too(tmp_path: Path) -> None:
    model = tiny_model("llama-tied", dtype=torch.float16)
    for recipe in ("int8-weights", "int8-dynamic", "int4-nearest"):
        with exported(model, tmp_path / recipe, load_recipe(recipe), dtype="fp16") as session:
            logits = session.prefill(random_ids(1, 20))
            assert np.isfinite(logits).all()
            assert logits.std() > 0.1


def test_a_tied_table_is_stored_once_and_weights_are_small(tmp_path: Path) -> None:
    model = tiny_model("llama-tied")
    matrices = {id(p): p.numel() for p in model.parameters() if p.ndim == 2}
    with exported(model, tmp_path / "b", load_recipe("int8-channel"), chunk_size=1) as session:
        graph = onnx.load(tmp_path / "b" / "decode.onnx", load_external_data=False).graph
    tables = [i.name for i in graph.initializer if i.data_type == onnx.TensorProto.UINT8 and i.dims[0] == 97]
    assert len(tables) == 1
    readers = {node.op_type for node in graph.node if tables[0] in node.input}
    assert readers == {"MatMulNBits", "Gather"}
    stored = sum(int(np.prod(i.dims)) for i in graph.initializer if i.data_type == onnx.TensorProto.UINT8)
    assert stored == sum(matrices.values())
    assert session.manifest.quantization is not None
    assert session.manifest.quantization.weights == "int8"


def edited(name: str, **changes: Any) -> Recipe:
    return parse_recipe({**load_recipe(name).model_dump(exclude_none=True), **changes}, "recipe 'test'")


def initializers(folder: Path) -> dict[str, int]:
    graph = onnx.load(folder / "decode.onnx", load_external_data=False).graph
    return {i.name: i.data_type for i in graph.initializer if len(i.dims) > 1 and np.prod(i.dims) > 100}


def test_what_a_recipe_keeps_stays_in_floating_point(tmp_path: Path) -> None:
    recipe = edited("int8-weights", keep_float=["model.layers.0.*", "*.k_proj"], lm_head="float")
    model = tiny_model("llama")
    with exported(model, tmp_path / "b", recipe, chunk_size=1):
        found = initializers(tmp_path / "b")
    floats = {name for name, kind in found.items() if kind == onnx.TensorProto.FLOAT}
    assert all("layers.0." in n or "k_proj" in n or "lm_head" in n for n in floats if ".scales" not in n), floats
    assert any("layers.0.self_attn.q_proj" in name for name in floats)
    assert any("layers.1.self_attn.k_proj" in name and "+" not in name for name in floats)
    assert any("layers.1.self_attn.q_proj" in name and "v_proj" in name for name in set(found) - floats)


def test_families_refine_a_recipe(tmp_path: Path) -> None:
    recipe = edited("int8-weights", families={"llama": {"keep_float": ["*.down_proj"]}, "phi": {"lm_head": "float"}})
    with exported(tiny_model("llama"), tmp_path / "b", recipe, chunk_size=1):
        floats = {name for name, kind in initializers(tmp_path / "b").items() if kind == onnx.TensorProto.FLOAT}
    assert {name for name in floats if ".scales" not in name} == {
        f"model.model.layers.{i}.mlp.down_proj.weight.T" for i in range(2)
    }


def test_the_manifest_has_the_refined_recipe_and_what_is_refined_is_checked(tmp_path: Path) -> None:
    four_bits = {"weights": {"bits": 4, "granularity": "block", "block_size": 32}}
    with exported(tiny_model("llama"), tmp_path / "b", edited("int8-weights", families={"llama": four_bits})) as small:
        assert small.manifest.quantization is not None
        assert small.manifest.quantization.weights == "int4"
    windowed = edited("int8-channel", families={"llama": {"kv": "int8"}})
    with pytest.raises(UsageError, match="received int8 with --native"):
        exported(tiny_model("llama"), tmp_path / "c", windowed, target="tensorrt", native=True)
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_a_tied_table_follows_the_output_projection_into_floating_point(tmp_path: Path) -> None:
    for number, changes in enumerate(({"lm_head": "float"}, {"keep_float": ["lm_head", "model.embed_tokens"]})):
        folder = tmp_path / str(number)
        with exported(tiny_model("llama-tied"), folder, edited("int8-weights", **changes), chunk_size=1):
            graph = onnx.load(folder / "decode.onnx", load_external_data=False).graph
        tables = [i.data_type for i in graph.initializer if list(i.dims[:1]) == [97]]
        assert tables == [onnx.TensorProto.FLOAT]


@pytest.mark.slow
def test_an_untied_embedding_may_stay_in_floating_point(tmp_path: Path) -> None:
    for embeddings, kind in (("float", onnx.TensorProto.FLOAT), ("int8", onnx.TensorProto.UINT8)):
        with exported(
            tiny_model("llama"), tmp_path / embeddings, edited("int8-weights", embeddings=embeddings), chunk_size=1
        ):
            found = initializers(tmp_path / embeddings)
        assert [k for name, k in found.items() if "embed_tokens" in name and ".scales" not in name] == [kind]


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_tensorrt) for name in ("llama", "llama-tied")])
def test_tensorrt_builds_int8_weights(name: str, tmp_path: Path) -> None:
    recipe = load_recipe("int8-channel")
    with exported(tiny_model(name), tmp_path / "b", recipe, target="tensorrt", native=True) as session:
        for graph in session.manifest.graphs.values():
            report = build_engine(tmp_path / "b" / graph.file)
            assert report.engine_bytes > 0
            assert report.layer_types["DEQUANTIZE"] >= 9  # 4 matmuls a layer and the output projection


def test_recipes_that_cannot_be_followed_are_refused() -> None:
    with pytest.raises(UsageError, match="recipe 'int8-dynamic': received target tensorrt, expected onnx"):
        ExportConfig(recipe=load_recipe("int8-dynamic"), target="tensorrt")
    static = edited(
        "int8-channel",
        activations={"mode": "static", "sinks": "separate"},
        calibration={"method": "minmax", "samples": 1, "length": 64},
    )
    with pytest.raises(UsageError, match="received no calibration"):
        ExportConfig(recipe=static)


@pytest.mark.slow
def test_verify_asks_for_a_tolerance(tmp_path: Path) -> None:
    exported(tiny_model("llama"), tmp_path / "b", load_recipe("int8-weights")).close()
    loaded = LoadedModel(tiny_model("llama"), None, "tiny")
    with pytest.raises(UsageError, match="a bundle quantised by 'int8-weights'"):
        verify(tmp_path / "b", loaded)
    assert verify(tmp_path / "b", loaded, tolerance=2.0, wraps=1).passed


@pytest.mark.parametrize("sinks", ["separate", "excluded", "included"])
def test_static_ranges_reach_the_graph(sinks: str, shared_export: SharedExports, tmp_path: Path) -> None:
    """A static bundle whose ranges fit is near the floating-point one; the sinks' range is as asked for."""

    class Fixed:
        sha256 = "0" * 64
        num_sink_tokens = 2

        def input_range(self, module: str) -> InputRange:
            return InputRange(rest=8.0, sinks=32.0, all=32.0)

        def divisors(self, module: str) -> None: ...
        def readers(self, module: str) -> tuple[str, ...]:
            return (module,)

        def check_recipe(self, recipe: Recipe) -> None: ...
        def check_model(self, model: Any) -> None: ...

    recipe = edited(
        "int8-channel",
        activations={"mode": "static", "sinks": sinks},
        lm_head="int8",
        targets=["onnx"],
        calibration={"method": "minmax", "samples": 1, "length": 64},
    )
    ids = random_ids(1, 20)
    with exported(tiny_model("llama"), tmp_path / "q", recipe, calibration=Fixed()) as session:
        steps = [session.step(column).copy() for column in ids.T]
        session.reset()
        assert np.abs(session.prefill(ids) - steps[-1]).max() < 2e-2 * steps[-1].std()
        assert session.manifest.quantization is not None
        assert session.manifest.quantization.activations == "static"
    plain = shared_export("llama", **GEOMETRY)
    with plain.session() as session:
        exact = [session.step(column).copy() for column in ids.T]
    errors = [np.abs(a - b).mean() / b.std() for a, b in zip(steps, exact, strict=True)]
    assert 1e-3 < np.mean(errors) < 0.3
    nodes = [n.op_type for n in onnx.load(tmp_path / "q" / "decode.onnx", load_external_data=False).graph.node]
    assert nodes.count("MatMulIntegerToFloat") == 8  # 4 matmuls a layer
    chosen = {"separate": 8, "excluded": 0, "included": 0}[sinks]
    base = onnx.load(plain.path / "decode.onnx", load_external_data=False).graph.node
    assert nodes.count("Where") == [n.op_type for n in base].count("Where") + chosen


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    weight = make_weight(np.random.default_rng(0), 4, 32, WeightScheme(8))
    weight.source.numpy()[1, 2] = np.nan
    with pytest.raises(UsageError, match="weights 'w'"):
        weight.scales()


def test_block_sizes_fit_the_operator() -> None:
    rng = np.random.default_rng(0)
    sizes = {depth: block_size(make_weight(rng, 2, depth, WeightScheme(8))) for depth in (576, 1536, 48, 97, 2048)}
    assert sizes == {576: 64, 1536: 256, 48: 16, 97: 32, 2048: 256}
