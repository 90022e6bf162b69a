"""Biases, gates and weighted sums of MoE experts, by the CPU library's nodes of their matmuls."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
import onnx_ir as ir

from sinkexport.graph.cpu_fusion import absorb, reordered_bias, repacked
from sinkexport.graph.cpu_nodes import ExpertLinear, find_expert_linears
from sinkexport.graph.edit import (
    drop_unused,
    is_weight,
    known_shape,
    number_times,
    only_user,
    operand,
    optional,
)
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.moved_rows import Moved, moved, rows_of_columns
from sinkexport.graph.spelled_activations import SpelledGate, find_gate_of

FLOAT = ir.DataType.FLOAT


class FuseCpuExperts(GraphPass):
    """A matmul by chosen matrices takes over what follows it.

    In this order: a bias of each expert, the gate whose halves are its results, the sum over a token's experts, a
    multiplier.

    Gates and ups that come in turns (gpt-oss) are reordered. Views of its inputs that keep rows are left out.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse one kind after the other."""
        graph = model.graph
        modified = _drop_casts(graph) | drop_unused(graph)
        with_gate = functools.partial(_with_gate, graph)
        for fuse in (_without_views, _with_bias, with_gate, _with_sums, _with_multiplier, _without_views):
            modified |= absorb(graph, find_expert_linears(graph), fuse)
        return ir.passes.PassResult(model, modified)


def _drop_casts(graph: ir.Graph) -> bool:
    """Leave out casts to the type that a value has, which routers are full of."""
    casts = [node for node in graph if node.op_type == "Cast" and not node.domain]
    found = [n for n in casts if n.outputs[0].dtype is not None and operand(n, 0).dtype == n.outputs[0].dtype]
    for node in found:
        ir.convenience.replace_all_uses_with(node.outputs[0], operand(node, 0), replace_graph_outputs=True)
        graph.remove(node, safe=True)
    return bool(found)


Found = tuple[ir.Node, ExpertLinear]


def _source(value: ir.Value) -> ir.Value:
    """What a value is a view of, which has its elements in the same order and its type."""
    source, dtype = value, value.dtype
    while (node := source.producer()) is not None and not node.domain:
        if node.op_type not in ("Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten"):
            break
        source = operand(node, 0)
        if source.dtype == dtype:
            value = source
        elif source.dtype is not None:
            break
    return value


def _without_views(node: ir.Node, linear: ExpertLinear) -> Found | None:
    x, picks = _source(linear.x), _source(linear.picks)
    x = x if known_shape(x)[-1] == linear.in_features else linear.x
    if x is linear.x and picks is linear.picks:
        return None
    return node, dataclasses.replace(linear, x=x, picks=picks)


def _with_bias(node: ir.Node, linear: ExpertLinear) -> Found | None:
    addition = only_user(_viewed(node, linear), "Add")
    if addition is None or linear.bias is not None or linear.activation != "none":
        return None
    for value in (operand(addition, 0), operand(addition, 1)):
        gather = value.producer()
        if gather is None or gather.op_type != "Gather" or gather.domain:
            continue
        table, axis = operand(gather, 0), gather.attributes["axis"].as_int() if "axis" in gather.attributes else 0
        is_table = is_weight(table) and table.dtype == FLOAT and axis == 0
        is_bias = is_table and known_shape(table) == (linear.num_experts, linear.out_features)
        is_picked = _source(operand(gather, 1)) is _source(linear.picks)
        if is_bias and is_picked and _rows(value) == _rows(addition.outputs[0]):
            return addition, dataclasses.replace(linear, bias=table)
    return None


def _rows(value: ir.Value) -> tuple[int, int]:
    *leading, width = known_shape(value)
    return int(np.prod(leading)), width


def _viewed(node: ir.Node, linear: ExpertLinear) -> ir.Value:
    """The result, or a view of it that keeps its rows and alone reads it."""
    result = node.outputs[0]
    view = only_user(result, "Reshape")
    return view.outputs[0] if view is not None and known_shape(view.outputs[0])[-1] == linear.out_features else result


def _with_gate(graph: ir.Graph, node: ir.Node, linear: ExpertLinear) -> Found | None:
    result, matrix = _viewed(node, linear), linear.matrix
    if matrix is None or linear.is_gated or linear.pick_weights is not None or linear.residual is not None:
        return None
    if len(known_shape(result)) != 2 or linear.shares_weights:
        return None
    halves = [value for use in result.uses() for value in use.node.outputs]
    source = moved(result).source
    if len(halves) != 2 or any(moved(half).source is not source for half in halves):
        return None
    for gate, up in itertools.permutations(halves):
        found = find_gate_of(gate, up)
        if found is not None:
            return _gated(graph, linear, found, moved(gate), moved(up))
    return None


def _gated(graph: ir.Graph, linear: ExpertLinear, found: SpelledGate, gate: Moved, up: Moved) -> Found | None:
    matrix = linear.matrix
    count = int(np.prod(known_shape(linear.picks)))
    rows = [rows_of_columns(half.steps, (count, linear.out_features)) for half in (gate, up)]
    if matrix is None or rows[0] is None or rows[1] is None:
        return None
    order, bias = np.concatenate([rows[0], rows[1]]), linear.bias
    if not np.array_equal(np.sort(order), np.arange(linear.out_features)):
        return None
    if not np.array_equal(order, np.arange(len(order))):
        matrix = matrix.reordered(order)
        bias = None if bias is None else reordered_bias(graph, bias, order)
    fused = dataclasses.replace(
        linear,
        weights=repacked(graph, linear, dataclasses.replace(matrix, is_gated=True)),
        out_features=linear.out_features // 2,
        bias=bias,
        is_gated=True,
        activation=found.activation,
        activation_limit=found.limit,
    )
    return found.last, fused


def _with_multiplier(node: ir.Node, linear: ExpertLinear) -> Found | None:
    """Sums times one number (Granite)."""
    found = number_times(_viewed(node, linear))
    if found is None or linear.pick_weights is None or linear.residual is not None or linear.multiplier != 1.0:
        return None
    reader, number = found
    return reader, dataclasses.replace(linear, multiplier=number)


def _with_sums(node: ir.Node, linear: ExpertLinear) -> Found | None:
    """Rows times the weights of their picks, summed up over the experts of a token."""
    result = _viewed(node, linear)
    product = only_user(result, "Mul")
    if product is None or linear.pick_weights is not None or linear.residual is not None:
        return None
    factor = operand(product, 1) if operand(product, 0) is result else operand(product, 0)
    scaled, weights = product.outputs[0], _source(factor)
    count = int(np.prod(known_shape(linear.picks)))
    if factor is result or weights.dtype != FLOAT or known_shape(factor)[-1:] != (1,):
        return None
    if known_shape(factor)[:-1] != known_shape(result)[:-1] or known_shape(scaled) != known_shape(result):
        return None
    if (view := only_user(scaled, "Reshape")) is not None:
        scaled = view.outputs[0]
    reduced = only_user(scaled, "ReduceSum")
    axes = None if reduced is None else optional(reduced, 1)
    *leading, top_k, width = known_shape(scaled)
    if reduced is None or axes is None or axes.const_value is None or width != linear.out_features:
        return None
    if [int(axis) % len(known_shape(scaled)) for axis in axes.const_value.numpy().reshape(-1)] != [len(leading)]:
        return None
    if int(np.prod(leading)) * top_k != count or known_shape(weights)[-1:] != (top_k,):
        return None
    return reduced, dataclasses.replace(linear, pick_weights=weights)
