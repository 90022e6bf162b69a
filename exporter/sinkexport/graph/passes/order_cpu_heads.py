"""Queries, keys and values that one matmul makes in another order: its rows are reordered while they are packed.

Some families keep them in turns by head (GPT-NeoX, Bloom) or by groups (Falcon). In the order of attention a Split and
three views are left, which SinkAttention needs none of.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.cpu_fusion import reordered_bias, repacked
from sinkexport.graph.cpu_nodes import Linear, is_cpu_node, is_linear
from sinkexport.graph.edit import drop_unused, known_shape, operand, split_source
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.moved_rows import Moved, moved, rows_of_heads
from sinkexport.graph.operators import SINK_ATTENTION, Input
from sinkexport.graph.output_gate import BY_TOKEN

HEADS = (Input.Q, Input.K, Input.V)


class OrderCpuHeads(GraphPass):
    """Give every SinkAttention views of one Split, queries, keys and values in this order.

    What lies between its matmul and attention may only move numbers about, and nothing else may read them.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Reorder rows of matmuls and what is read of them."""
        graph, modified = model.graph, drop_unused(model.graph)
        rows_of = functools.cache(rows_of_heads)  # of the layers' steps, which are alike
        for node in list(graph):
            if node.op_type != SINK_ATTENTION or not is_cpu_node(node) or node.attributes["packed_width"].as_int():
                continue
            order = _order(node, rows_of)
            if order is not None:
                _reorder(graph, node, order)
                modified = True
        if modified:
            drop_unused(graph)
        return ir.passes.PassResult(model, modified)


@dataclasses.dataclass(frozen=True)
class _Order:
    """source: what queries, keys and values are moved out of. rows: int64 [N], its outputs in their order."""

    source: ir.Value
    linear: Linear
    rows: np.ndarray


def _order(node: ir.Node, rows_of: Callable[..., np.ndarray | None]) -> _Order | None:
    """The order that a node wants; None: it has it, or there is no one matmul whose rows could be reordered."""
    parts = [moved(operand(node, i)) for i in HEADS]
    source = parts[0].source
    linear = _linear(source)
    if linear is None or any(part.source is not source for part in parts) or _is_in_order(parts):
        return None
    if not _are_all_readers(source, node, parts):
        return None
    found = [rows_of(part.steps, known_shape(source)) for part in parts]
    if any(rows is None for rows in found):
        return None
    rows = np.concatenate([each.reshape(-1) for each in found if each is not None])
    if not np.array_equal(np.sort(rows), np.arange(linear.out_features)):
        return None
    return _Order(source, linear, rows)


def _linear(source: ir.Value) -> Linear | None:
    """The matmul whose rows can be reordered: each of its outputs is computed apart from the others."""
    node = source.producer()
    if node is None or not is_linear(node):
        return None
    linear = Linear.of(node)
    has_others = linear.is_gated or linear.residual is not None or linear.output_norm_weight is not None
    if has_others or linear.matrix is None or linear.shares_weights:
        return None
    return linear


def _is_in_order(parts: Sequence[Moved]) -> bool:
    """Whether the parts are views of one Split already, which `pack_heads` takes."""
    views = []
    for part in parts:
        nodes = [each for each in part.nodes if each.op_type != "Transpose"]
        if [each.op_type for each in nodes] != ["Split", "Reshape"]:
            return False
        views.append(operand(nodes[1], 0))
    return split_source(views) is not None


def _are_all_readers(source: ir.Value, node: ir.Node, parts: Sequence[Moved]) -> bool:
    """Whether nothing else reads what is moved on the way to attention."""
    inside = {node, *(each for part in parts for each in part.nodes)}
    values = [source, *(value for each in inside if each is not node for value in each.outputs)]
    return not any(value.is_graph_output() or any(use.node not in inside for use in value.uses()) for value in values)


def _reorder(graph: ir.Graph, node: ir.Node, order: _Order) -> None:
    linear, matrix, before = order.linear, order.linear.matrix, order.source.producer()
    if matrix is None or before is None:
        raise ValueError(f"'{node.name}' has lost its matmul")
    weights = repacked(graph, linear, matrix.reordered(order.rows))
    bias = None if linear.bias is None else reordered_bias(graph, linear.bias, order.rows)
    b = Builder(graph)
    whole = dataclasses.replace(linear, weights=weights, bias=bias).write(b)
    shapes = [known_shape(operand(node, i)) for i in HEADS]
    batch, _, tokens, _ = shapes[0]
    whole = b.reshape(whole, (batch, tokens, linear.out_features))
    parts = b.split(whole, [heads * size for _, heads, _, size in shapes], -1)
    for i, part, (_, heads, _, size) in zip(HEADS, parts, shapes, strict=True):
        if tokens == 1:
            rows = b.reshape(part, (batch, heads, 1, size))
        else:
            rows = b.reshape(part, (batch, tokens, heads, size))
            rows = b.op("Transpose", [rows], (batch, heads, tokens, size), perm=list(BY_TOKEN))
        node.replace_input_with(i, rows)
    graph.insert_before(before, b.nodes)
