"""Attention's extras as inputs of the plugin's node: ALiBi, learned sink logits, factors on token 0, output gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from onnx import TensorProto, numpy_helper
from sinkexport.config import WEIGHT_DTYPES
from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape
from sinkexport.graph.output_gate import absorb, find_output_gate
from sinkexport.tensorrt.build_engines import build_bundle
from sinkexport.tensorrt.options import BuildOptions
from sinkexport.tensorrt.process import build_engine_apart
from sinkrt import Session
from sinkrt.errors import BackendError

from tests.exporter.graph.plugin_evaluator import PluginBundle
from tests.exporter.graph.test_plugin_target import NEEDS_BUILD, S, W, exported, plugin_nodes
from tests.exporter.tiny_models import TINY, VOCAB_SIZE
from tests.exporter.variants.test_head_windows import window_file
from tests.exporter.variants.test_sink_tuning import tuning
from tests.support import random_ids

FLAGS = ("has_alibi", "has_sink_logit", "has_sink_scale", "has_gate")
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "pad_token_id": 0,
}
_SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}

# Configuration and the flag of what its attention has besides. All have heads of 64.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "bloom": ("BloomConfig", {**TINY["bloom"][1], "hidden_size": 128, "n_head": 2}, "has_alibi"),
    "mpt": ("MptConfig", {**TINY["mpt"][1], "d_model": 192, "n_heads": 3}, "has_alibi"),
    "falcon-alibi": (
        "FalconConfig",
        {**TINY["falcon-alibi"][1], "hidden_size": 128, "num_attention_heads": 2},
        "has_alibi",
    ),
    # Positions in sliding layers only, sink logits in all; with `mlp_only_layers` it has no experts.
    "flint": ("FlintConfig", {**_SIZES, **_SLIDING_AND_FULL, "mlp_only_layers": [0, 1]}, "has_sink_logit"),
    "llama": ("LlamaConfig", {**TINY["llama"][1], "head_dim": 64}, "has_sink_scale"),  # by a file
    "afmoe": ("AfmoeConfig", {**_SIZES, **_SLIDING_AND_FULL, "num_dense_layers": 2}, "has_gate"),
    "qwen3_5_text": (
        "Qwen3_5TextConfig",
        {**TINY["qwen3_5_text"][1], "head_dim": 64, "layer_types": ["full_attention"] * 2},
        "has_gate",
    ),
}


def random_model(name: str, dtype: str = "fp32") -> Any:
    """Random, with logits that spread enough for every extra to matter and little enough for float16."""
    config_class, arguments, _ = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**arguments)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.to(getattr(torch, WEIGHT_DTYPES[dtype]))


def attentions(folder: Path, role: str) -> list[tuple[onnx.NodeProto, dict[str, Any]]]:
    """The nodes and their fields."""
    graph = onnx.load(folder / f"{role}.onnx", load_external_data=False).graph
    found = [node for node in graph.node if node.op_type == "SinkAttention"]
    return [(node, {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}) for node in found]


def errors(under_test: PluginBundle, session: Session, ids: np.ndarray, prefilled: int) -> list[float]:
    """Error of each step of ids [B, N] and, if `prefilled` > 0, of what so many tokens of the only stream end with."""
    pairs = []
    if prefilled:
        pairs = [(under_test.prefill(ids[0, :prefilled]), session.prefill(ids[:, :prefilled]).copy())]
    pairs += [(under_test.step(column), session.step(column).copy()) for column in ids[:, prefilled:].T]
    return [float(np.linalg.norm(got - want) / np.linalg.norm(want)) for got, want in pairs]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("bloom", {"kv": "int8"}),
        ("mpt", {"num_sink_tokens": 0}),
        ("falcon-alibi", {"budgets": window_file("falcon-alibi", ((9, 5), (4, 9)))}),
        ("flint", {}),
        ("llama", {"sink_tuning": tuning("llama")}),
        ("afmoe", {}),
    ],
    ids=str,
)
def test_the_node_computes_what_the_onnx_bundle_does(name: str, config: dict, tmp_path: Path) -> None:
    """Chunks, then steps past six wraps. Attention's inputs are rounded to float16 for the plugin."""
    model = random_model(name)
    manifest = exported(model, tmp_path / "plugin", target="tensorrt", **config)
    exported(model, tmp_path / "onnx", **config)
    for role in manifest.graphs:
        for _, attributes in attentions(tmp_path / "plugin", role):
            assert [flag for flag in FLAGS if attributes[flag]] == [MODELS[name][2]]
    ids = random_ids(1, S + 6 * W + 7, seed=1)
    with Session.load(tmp_path / "onnx", threads=1) as session:
        found = errors(PluginBundle(tmp_path / "plugin", manifest), session, ids, 14)
    assert max(found) < 0.01
    assert np.median(found) < 0.004


@pytest.mark.slow
def test_gates_of_two_streams(tmp_path: Path) -> None:
    """Nothing of the gate is left outside of the node."""
    model, options = random_model("qwen3_5_text"), {"batch": 2, "chunk_size": 1}
    manifest = exported(model, tmp_path / "plugin", target="tensorrt", **options)
    exported(model, tmp_path / "onnx", **options)
    graph = onnx.load(tmp_path / "plugin" / "decode.onnx", load_external_data=False).graph
    assert sum(node.op_type == "Sigmoid" for node in graph.node) == 2  # the SiLU of both layers
    with Session.load(tmp_path / "onnx", threads=1) as session:
        found = errors(
            PluginBundle(tmp_path / "plugin", manifest),
            session,
            random_ids(2, 20, seed=2),
            0,
        )
    assert max(found) < 0.01


@pytest.mark.parametrize("name", ["bloom", "flint"])
def test_numbers_of_heads_are_float32_constants_whatever_the_model_is(name: str, tmp_path: Path) -> None:
    exported(random_model(name, "fp16"), tmp_path / "b", target="tensorrt", dtype="fp16", chunk_size=1)
    constants = {one.name: one for one in onnx.load(tmp_path / "b" / "decode.onnx").graph.initializer}
    for node, _ in attentions(tmp_path / "b", "decode"):
        assert constants[node.input[-1]].data_type == TensorProto.FLOAT


class TestOutputGate:
    """Only a Mul by the sigmoid of something else, right after the attention, is its gate."""

    B, H, T, D = 1, 2, 3, 4

    def gated(
        self,
        *,
        perm: tuple[int, ...] = (0, 2, 1, 3),
        gate: tuple[int, ...] = (1, 3, 8),
        function: str = "Sigmoid",
        source: str = "gate",
        swapped: bool = False,
        joins: bool = True,
    ) -> ir.Node:
        """The attention of a graph out -> Transpose -> Reshape, if it joins heads -> Mul."""
        b, h, t, d = self.B, self.H, self.T, self.D
        values = {
            name: ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
            for name, shape in {"q": (b, h, t, d), "gate": gate}.items()
        }
        attention = ir.node("SinkAttention", [values["q"]], domain="ai.sinkexport")
        out = attention.outputs[0]
        moved = ir.node("Transpose", [out], {"perm": perm})
        joined = ir.node("Reshape", [moved.outputs[0]]) if joins else moved
        ungated = joined.outputs[0]
        factor = ir.node(function, [values["gate"] if source == "gate" else ungated])
        pair = [ungated, factor.outputs[0]]
        multiplied = ir.node("Mul", pair[::-1] if swapped else pair)
        by_token = tuple((b, h, t, d)[axis] for axis in perm)
        shapes = {attention: (b, h, t, d), moved: by_token, joined: (b, t, h * d) if joins else by_token}
        shapes |= {factor: gate, multiplied: shapes[joined]}
        for node, shape in shapes.items():
            node.outputs[0].shape, node.outputs[0].dtype = ir.Shape(shape), ir.DataType.FLOAT
        ir.Graph(list(values.values()), multiplied.outputs, nodes=list(shapes), opset_imports={"": 24})
        return attention

    @pytest.mark.parametrize(
        ("changes", "last_axis"),
        [({}, 4), ({"swapped": True}, 4), ({"joins": False, "gate": (1, 3, 2, 1)}, 1)],
        ids=str,
    )
    def test_found(self, changes: dict[str, Any], last_axis: int) -> None:
        attention = self.gated(**changes)
        found = find_output_gate(attention)
        assert found is not None
        assert found.gate.name == "gate"
        assert isinstance(attention.graph, ir.Graph)
        assert known_shape(absorb(Builder(attention.graph), found, self.H)) == (self.B, self.H, self.T, last_axis)
        assert "Mul" not in [node.op_type for node in attention.graph]

    @pytest.mark.parametrize(
        "changes",
        [
            {"perm": (0, 2, 3, 1)},
            {"gate": (1, 1, 8)},
            {"gate": (1, 3, 2, 1)},
            {"function": "Tanh"},
            {"source": "out"},
        ],
        ids=str,
    )
    def test_left_alone(self, changes: dict[str, Any]) -> None:
        assert find_output_gate(self.gated(**changes)) is None


class TestBuilding:
    pytestmark = NEEDS_BUILD

    @pytest.mark.slow
    @pytest.mark.parametrize("name", MODELS)
    def test_engines_are_built(self, name: str, plugin_library: Path, tmp_path: Path) -> None:
        options = {"sink_tuning": tuning("llama")} if name == "llama" else {}
        exported(random_model(name, "fp16"), tmp_path / "b", target="tensorrt", dtype="fp16", **options)
        built = build_bundle(tmp_path / "b", BuildOptions(plugin_library))
        assert sorted(built) == ["decode", "prefill"]
        for role, (_, report) in built.items():
            nodes = plugin_nodes(tmp_path / "b", role)
            assert nodes.count("SinkAttention") == 2
            assert report.layer_types["PLUGIN_V3"] == len(nodes)

    @pytest.mark.slow
    def test_numbers_of_other_heads_are_refused(self, plugin_library: Path, tmp_path: Path) -> None:
        exported(random_model("bloom", "fp16"), tmp_path / "b", target="tensorrt", dtype="fp16", chunk_size=1)
        model = onnx.load(tmp_path / "b" / "decode.onnx", load_external_data=False)
        slopes = next(node for node in model.graph.node if node.op_type == "SinkAttention").input[-1]
        constant = next(one for one in model.graph.initializer if one.name == slopes)
        constant.CopyFrom(numpy_helper.from_array(np.ones(3, np.float32), slopes))
        onnx.save(model, tmp_path / "b" / "decode.onnx")
        with pytest.raises(BackendError, match=r"SinkAttention.*configurePlugin"):
            build_engine_apart(tmp_path / "b" / "decode.onnx", tmp_path / "x.engine", BuildOptions(plugin_library))
