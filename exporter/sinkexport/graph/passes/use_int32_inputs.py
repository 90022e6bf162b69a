"""Token ids, positions and numbers of valid tokens as int32: TensorRT 8.5 has no int64 inputs.

A position is two words, t >> 16 and t & 0xffff, so that every position that the exact phase reaches can be expressed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import constant, drop_unused, known_shape, operand, replace_node, typed
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.operators import DOMAIN, SINK_ATTENTION
from sinkexport.graph.plugin_nodes import is_plugin

WORD_BITS = 16
"""A position is given as t >> 16 and t & 0xffff."""


class UseInt32Inputs(GraphPass):
    """ids int64 -> int32; position int64 [B] -> int32 [B, 2]; num_valid int64 [B] -> int32.

    The graph's first inputs are ids and position; the plugin's attention nodes read num_valid if there is one.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the inputs, and what reads them."""
        graph = model.graph
        if len(graph.inputs) < 2 or graph.inputs[1].dtype != ir.DataType.INT64:
            return ir.passes.PassResult(model, False)
        ids, position = graph.inputs[:2]
        if (num_valid := _num_valid(graph)) is not None:
            _select_last_token(graph, num_valid)
            _narrow(graph, num_valid, ("Sub",))  # that of the selection
        _split_position(graph, position)
        _narrow_ids(graph, ids)
        return ir.passes.PassResult(model, True)


def _num_valid(graph: ir.Graph) -> ir.Value | None:
    """What attention nodes read as num_valid: after three operands, the position, the states and a frequency."""
    for node in graph:
        if node.domain == DOMAIN and node.op_type == SINK_ATTENTION and is_plugin(node):
            if not node.attributes["has_num_valid"].as_int():
                return None
            has_frequency = node.attributes["rotary_dim"].as_int() > 0
            return operand(node, 4 + len(node.outputs) - 1 + has_frequency)
    return None


def _select_last_token(graph: ir.Graph, num_valid: ir.Value) -> None:
    """GatherElements of the last token that counts, [1, T, N] -> [1, 1, N], becomes a Gather with an int32 index.

    TensorRT 8.5 neither clips integers nor has int64.
    """
    for node in list(graph):
        if node.op_type != "GatherElements" or node.domain or not _is_of(operand(node, 1), num_valid):
            continue  # a router picks its experts' scores by such nodes
        values = operand(node, 0)
        batch, _, width = known_shape(values)
        if batch != 1:
            raise ValueError(f"a chunk of {batch} streams")
        b = Builder(graph)
        one, zero = (constant(graph, np.array([n], np.int32), hint) for n, hint in ((1, "one"), (0, "zero")))
        last = b.op("Max", [b.op("Sub", [num_valid, one], (1,), ir.DataType.INT32), zero])
        replace_node(node, b.nodes, [b.op("Gather", [values, last], (1, 1, width), values.dtype, axis=1)])
    drop_unused(graph)


def _is_of(value: ir.Value, source: ir.Value) -> bool:
    """Whether `value` is computed of `source` and constants alone."""
    node = value.producer()
    while node is not None and value is not source:
        variable = [v for v in node.inputs if v is not None and v.const_value is None]
        if len(variable) != 1:
            return False
        value, node = variable[0], variable[0].producer()
    return value is source


def _split_position(graph: ir.Graph, position: ir.Value) -> None:
    """int64 [B] -> int32 [B, 2]. What else asks for the position only asks whether a token is a sink, one of the first
    S < 65536: it gets min(t >> 16, 1) * 65536 + (t & 0xffff)."""
    others = [use for use in position.uses() if use.node.domain != DOMAIN]
    (batch,) = known_shape(position)
    typed(position, (batch, 2), ir.DataType.INT32)
    if not others:
        return
    b = Builder(graph)
    high, low = b.split(position, [1, 1], 1)
    one, word = (constant(graph, np.array(n, np.int32), hint) for n, hint in ((1, "one"), (1 << WORD_BITS, "word")))
    small = b.op("Add", [b.op("Mul", [b.op("Min", [high, one]), word]), low])
    small = b.cast(b.reshape(small, (batch,)), ir.DataType.INT64)
    for use in others:
        use.node.replace_input_with(use.idx, small)
    graph.insert_before(graph[0], b.nodes)


def _narrow_ids(graph: ir.Graph, ids: ir.Value) -> None:
    """int64 -> int32: indices of a Gather may be either, Int8Rows wants it. So may what is compared with a constant."""
    for use in ids.uses():
        other = use.node.inputs[1 - use.idx] if use.node.op_type in ("Greater", "Max") else None
        if other is None or other.const_value is None:
            continue
        narrow = constant(graph, other.const_value.numpy().astype(np.int32), "id")
        use.node.replace_input_with(1 - use.idx, narrow)
        if use.node.op_type == "Max":
            _narrow_ids(graph, use.node.outputs[0])
    _narrow(graph, ids, ("Gather", "Greater", "Max"))


def _narrow(graph: ir.Graph, value: ir.Value, takers: Sequence[str]) -> None:
    """int64 -> int32: `takers` and the plugin's nodes take it so, anything else gets int64 as before."""
    others = [use for use in value.uses() if use.node.op_type not in takers and use.node.domain != DOMAIN]
    value.dtype = ir.DataType.INT32
    if not others:
        return
    b = Builder(graph)
    wide = b.cast(value, ir.DataType.INT64)
    producer = value.producer()
    for use in others:
        use.node.replace_input_with(use.idx, wide)
    if producer is None:
        graph.insert_before(graph[0], b.nodes)
    else:
        graph.insert_after(producer, b.nodes)
