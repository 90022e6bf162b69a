"""fuse_cpu_head_norms: norms of queries and keys by the CPU library's SinkAttention. What it computes:
tests/plugins/cpu/test_sink_attention.py."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import constant
from sinkexport.graph.passes.fuse_cpu_head_norms import FuseCpuHeadNorms
from sinkexport.graph.passes.use_cpu_attention import UseCpuAttention

from tests.exporter.graph.passes.attention_graphs import (
    BATCH,
    DIM,
    HEADS,
    KV_HEADS,
    attention_graph,
    attention_of,
    value,
)
from tests.exporter.graph.passes.pass_checks import check_left_alone, kinds, parsed

FLOAT = ir.DataType.FLOAT


def normed_graph(
    num_tokens: int, view: str = "", *, names: str = "qk", epsilons: tuple[float, float] = (0.01, 0.01), axis: int = -1
) -> ir.Model:
    """Attention in the library's form over RMSNormalization (q), (k), before the view that moves heads or after it."""
    model = attention_graph(num_tokens)
    UseCpuAttention()(model)
    graph, node = model.graph, attention_of(model)
    b = Builder(graph)
    for i, (name, heads) in enumerate(zip("qk", (HEADS, KV_HEADS), strict=True)):
        rows = value(f"{name}_rows", (BATCH, num_tokens, heads * DIM), FLOAT)
        graph.inputs.append(rows)
        shape = (BATCH, heads, num_tokens, DIM)
        x = b.reshape(rows, (BATCH, num_tokens, heads, DIM) if view else shape)
        if name in names:
            weight = constant(graph, np.arange(1, DIM + 1, dtype=np.float32) + i, "norm")
            x = b.op("RMSNormalization", [x, weight], axis=axis, epsilon=epsilons[i])
        if view == "Transpose":
            x = b.op("Transpose", [x], shape, perm=[0, 2, 1, 3])
        node.replace_input_with(i, b.reshape(x, shape))
    graph.insert_before(node, b.nodes)
    return model


@pytest.mark.parametrize(
    ("num_tokens", "view", "left"),
    [
        (1, "", ["Reshape", "Reshape", "SinkAttention"]),
        (1, "Reshape", ["Reshape", "Reshape", "SinkAttention"]),
        (3, "Transpose", ["Reshape", "Reshape", "SinkAttention", "Transpose", "Transpose"]),
    ],
)
def test_norms_become_the_nodes_own(num_tokens: int, view: str, left: list[str]) -> None:
    model = normed_graph(num_tokens, view)
    before = attention_of(model)
    num_inputs, shape = len(before.inputs), before.inputs[0].shape
    assert FuseCpuHeadNorms()(model).modified
    assert kinds(model) == left
    node = attention_of(model)
    assert node.attributes["qk_norm"].as_int() == 1
    assert node.attributes["qk_norm_epsilon"].as_float() == pytest.approx(0.01)
    assert len(node.inputs) == num_inputs + 2
    assert node.inputs[0].shape == shape
    for i, weight in enumerate(node.inputs[-2:]):
        np.testing.assert_array_equal(weight.const_value.numpy(), np.arange(1, DIM + 1) + i)
    check_left_alone(model, FuseCpuHeadNorms())


@pytest.mark.parametrize(
    "model",
    [
        normed_graph(1, names=""),
        normed_graph(1, names="q"),
        normed_graph(1, epsilons=(0.01, 0.02)),
        normed_graph(3, "Transpose", names="k"),
        attention_graph(),
        parsed("y = Exp (x)", "float[2] x", "float[2] y"),
    ],
    ids=["none", "queries alone", "two epsilons", "keys alone", "traced attention", "no attention"],
)
def test_left_alone(model: ir.Model) -> None:
    check_left_alone(model, FuseCpuHeadNorms())
