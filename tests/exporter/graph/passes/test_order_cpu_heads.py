"""order_cpu_heads: rows of a matmul in the order in which attention reads them. Whole bundles: test_cpu_target.py."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from sinkexport.graph.builder import Builder
from sinkexport.graph.cpu_nodes import Linear
from sinkexport.graph.edit import constant
from sinkexport.graph.graph_pass import PassContext
from sinkexport.graph.packed_weights import PackedMatrix, shown_order
from sinkexport.graph.passes.order_cpu_heads import OrderCpuHeads
from sinkexport.graph.passes.pack_heads import PackHeads
from sinkexport.graph.passes.use_cpu_attention import UseCpuAttention
from sinkexport.targets import CPU

from tests.exporter.graph.passes.attention_graphs import (
    BATCH,
    DIM,
    HEADS,
    KV_HEADS,
    attention_graph,
    attention_of,
    value,
)
from tests.exporter.graph.passes.pass_checks import check_left_alone, kinds, numbers

DEPTH, GROUP = 8, HEADS // KV_HEADS
WIDTH = (HEADS + 2 * KV_HEADS) * DIM
FLOAT = ir.DataType.FLOAT


def graph(num_tokens: int, cut: str = "groups", *, also_read: bool = False) -> ir.Model:
    """A linear of x [B, T, K] whose outputs are cut into q, k and v of the library's attention.

    cut: ``groups``: queries of a group, its key, its value, by slices; ``gather``: the same by indices;
    ``twice``: keys are values too. also_read: whether something else reads the linear's result.
    """
    model = attention_graph(num_tokens)
    UseCpuAttention()(model)
    inner, node = model.graph, attention_of(model)
    x = value("x", (BATCH, num_tokens, DEPTH), FLOAT)
    inner.inputs.append(x)
    matrix = PackedMatrix("w", WIDTH, DEPTH, lambda: numbers(WIDTH, DEPTH))
    bias = constant(inner, numbers(WIDTH, seed=1), "bias")
    b = Builder(inner)
    whole = Linear.made(inner, x, matrix, bias).write(b)
    grouped = b.reshape(whole, (BATCH, num_tokens, KV_HEADS, GROUP + 2, DIM))
    for i, (first, count) in enumerate(((0, GROUP), (GROUP, 1), (GROUP if cut == "twice" else GROUP + 1, 1))):
        shape = (BATCH, num_tokens, KV_HEADS, count, DIM)
        if cut == "gather":
            part = b.op("Gather", [grouped, b.ints(np.arange(first, first + count), "i")], shape, axis=3)
        else:
            ends = [b.ints([n], "end") for n in (first, first + count, 3)]
            part = b.op("Slice", [grouped, *ends], shape)
        rows = b.reshape(part, (BATCH, num_tokens, KV_HEADS * count, DIM))
        node.replace_input_with(
            i, b.op("Transpose", [rows], (BATCH, KV_HEADS * count, num_tokens, DIM), perm=[0, 2, 1, 3])
        )
    inner.insert_before(node, b.nodes)
    out = Builder(inner)
    turned = out.op("Transpose", [node.outputs[0]], (BATCH, num_tokens, HEADS, DIM), perm=[0, 2, 1, 3])
    joined = out.op("Neg", [out.reshape(turned, (BATCH, num_tokens, HEADS * DIM))])
    inner.outputs[0] = joined
    if also_read:
        inner.outputs.append(out.op("Neg", [whole]))
    inner.insert_after(node, out.nodes)
    return model


@pytest.mark.parametrize("cut", ["groups", "gather"])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_rows_come_in_the_order_of_attention(num_tokens: int, cut: str) -> None:
    model = graph(num_tokens, cut)
    assert OrderCpuHeads()(model).modified
    by_group = np.arange(WIDTH).reshape(KV_HEADS, GROUP + 2, DIM)
    order = np.concatenate([by_group[:, part].reshape(-1) for part in (slice(GROUP), GROUP, GROUP + 1)])
    (node,) = (node for node in model.graph if node.op_type == "FloatLinear")
    linear = Linear.of(node)
    assert linear.matrix is not None
    np.testing.assert_array_equal(linear.matrix.rows(), numbers(WIDTH, DEPTH)[order])
    np.testing.assert_array_equal(linear.bias.const_value.numpy(), numbers(WIDTH, seed=1)[order])
    assert node.attributes["row_order"].as_string() == shown_order(order)
    check_left_alone(model, OrderCpuHeads())
    assert PackHeads(PassContext(target=CPU))(model).modified
    assert kinds(model) == ["FloatLinear", "Neg", "SinkAttention"]


def test_runs_are_shown() -> None:
    assert shown_order([4, 5, 6, 0, 1, 2, 3]) == "4:3,0:4"


@pytest.mark.parametrize(
    "model",
    [graph(1, "twice"), graph(3, also_read=True), attention_graph()],
    ids=["keys are values", "another reader", "traced attention"],
)
def test_left_alone(model: ir.Model) -> None:
    check_left_alone(model, OrderCpuHeads())
