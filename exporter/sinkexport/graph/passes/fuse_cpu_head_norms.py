"""RMS norms of queries, keys and values before the rotation, by the CPU library's SinkAttention.

Of queries and keys those of each head (Qwen3, Gemma 3) or of all heads of a token together (OLMo 2), of values those of
each head (Gemma 4).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.cpu_nodes import is_cpu_node
from sinkexport.graph.edit import drop_unused, is_weight, known_shape, operand, replace_node, typed
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.moved_rows import Moved, moved, rows_of_heads
from sinkexport.graph.operators import SINK_ATTENTION, Input
from sinkexport.graph.rms_norms import RowNorm, row_norm

EACH_HEAD, ALL_HEADS = 1, 2
"""Values of the field ``qk_norm``."""


class FuseCpuHeadNorms(GraphPass):
    """A SinkAttention whose queries and keys are both normalised does it itself, if both add the same epsilon.

    Between norm and attention numbers may be moved about as long as rows stay rows: heads are moved before tokens.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Give each such node what is before the norms."""
        graph, modified = model.graph, False
        for node in list(graph):
            if node.op_type != SINK_ATTENTION or not is_cpu_node(node) or node.attributes["packed_width"].as_int():
                continue
            after_keys = _with_qk_norm(graph, node)
            after_values = _with_v_norm(graph, after_keys or node)
            modified |= (after_keys or after_values) is not None
        if modified:
            drop_unused(graph)
        return ir.passes.PassResult(model, modified)


def takes_keys(node: ir.Node) -> bool:
    """Whether a SinkAttention whose tokens are not packed has keys and values among its inputs."""
    return not node.attributes["reads_only"].as_int() or known_shape(operand(node, Input.Q))[2] > 1


def _with_qk_norm(graph: ir.Graph, node: ir.Node) -> ir.Node | None:
    if node.attributes["qk_norm"].as_int():
        return None
    places = [Input.Q, Input.K] if takes_keys(node) else [Input.Q]
    found = [_norm_before(operand(node, place)) for place in places]
    norms = [norm for norm in found if norm is not None]
    if len(norms) < len(places) or len({(kind, norm.epsilon) for norm, kind, _ in norms}) > 1:
        return None
    (first, kind, _), b = norms[0], Builder(graph)
    inputs = list(node.inputs)
    for place, (norm, _, after) in zip(places, norms, strict=True):
        inputs[place] = _moved_again(b, norm.x, after)
    count = _inputs_before_norms(node)
    inputs[count:count] = [norm.scale for norm, *_ in norms]
    fields = {"qk_norm": ir.AttrInt64("qk_norm", kind), "qk_norm_epsilon": _float("qk_norm_epsilon", first.epsilon)}
    return _replaced(b, node, inputs, fields)


def _with_v_norm(graph: ir.Graph, node: ir.Node) -> ir.Node | None:
    if node.attributes["has_v_norm"].as_int() or not takes_keys(node):
        return None
    found = _norm_before(operand(node, Input.V))
    if found is None or found[1] != EACH_HEAD:
        return None
    norm, _, after = found
    b, inputs = Builder(graph), list(node.inputs)
    inputs[Input.V] = _moved_again(b, norm.x, after)
    count = _inputs_before_norms(node) + (2 if node.attributes["qk_norm"].as_int() else 0)
    inputs[count:count] = [norm.scale]
    fields = {"has_v_norm": ir.AttrInt64("has_v_norm", 1), "v_norm_epsilon": _float("v_norm_epsilon", norm.epsilon)}
    return _replaced(b, node, inputs, fields)


def _float(name: str, value: float) -> ir.Attr:
    return ir.AttrFloat32(name, value)


def _inputs_before_norms(node: ir.Node) -> int:
    """Inputs of a node that has no norm of values: its turned weights are the last."""
    norms = {0: 0, EACH_HEAD: 2, ALL_HEADS: 2}[node.attributes["qk_norm"].as_int()]
    return len(node.inputs) - norms - node.attributes["turned_weights"].as_int()


def _replaced(b: Builder, node: ir.Node, inputs: list[ir.Value | None], fields: Mapping[str, ir.Attr]) -> ir.Node:
    attributes = {**node.attributes, **fields}
    fused = ir.node(SINK_ATTENTION, inputs, attributes, domain=node.domain, num_outputs=len(node.outputs))
    for new, old in zip(fused.outputs, node.outputs, strict=True):
        typed(new, known_shape(old), old.dtype)
    replace_node(node, [*b.nodes, fused], fused.outputs)
    return fused


def _norm_before(heads: ir.Value) -> tuple[RowNorm, int, Moved] | None:
    """The norm of [B, H, T, D], of what it takes the mean, and how its result is moved on the way."""
    after = moved(heads)
    norm = row_norm(after.source.producer())
    if norm is None or not is_weight(norm.scale):
        return None
    width, (_, count, _, size) = known_shape(norm.x)[-1], known_shape(heads)
    rows = rows_of_heads(after.steps, known_shape(norm.x))
    if rows is None:
        return _norm_of_heads(norm, after, heads)
    are_views = all(node.op_type in ("Reshape", "Transpose") for node in after.nodes)
    if are_views and width == count * size and np.array_equal(rows.reshape(-1), np.arange(width)):
        return norm, EACH_HEAD if count == 1 else ALL_HEADS, after
    return _norm_of_heads(norm, after, heads)


def _norm_of_heads(norm: RowNorm, after: Moved, heads: ir.Value) -> tuple[RowNorm, int, Moved] | None:
    """The norm, if it is of rows that stay rows; their numbers may change places where the scale is one number."""
    size = known_shape(heads)[-1]
    if known_shape(norm.x)[-1] != size:
        return None
    for node in after.nodes:
        before, later = operand(node, 0), node.outputs[0]
        if node.op_type == "Transpose":
            keeps = node.attributes["perm"].as_ints()[-1] == len(known_shape(before)) - 1
        elif node.op_type == "Gather":
            keeps = _exchanges_numbers(node, size) and _is_one_number(norm.scale)
        else:
            keeps = node.op_type == "Reshape" and known_shape(before)[-1] == known_shape(later)[-1] == size
        if not keeps:
            return None
    return norm, EACH_HEAD, after


def _exchanges_numbers(node: ir.Node, size: int) -> bool:
    """Whether a Gather takes each of a row's numbers once (nanochat, which turns the other way)."""
    indices = operand(node, 1).const_value
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if indices is None or axis not in (-1, len(known_shape(operand(node, 0))) - 1):
        return False
    return np.array_equal(np.sort(indices.numpy().reshape(-1) % size), np.arange(size))


def _is_one_number(scale: ir.Value) -> bool:
    return scale.const_value is not None and bool(np.ptp(scale.const_value.numpy()) == 0)


def _moved_again(b: Builder, x: ir.Value, after: Moved) -> ir.Value:
    """x moved as the norm's result was. Two views one after the other are one."""
    value = x
    for node in after.nodes:
        shape = known_shape(node.outputs[0])
        if node.op_type == "Reshape":
            before = value.producer()
            is_view = before is not None and before.op_type == "Reshape" and not before.domain
            value = b.reshape(operand(before, 0) if is_view else value, shape)  # type: ignore[arg-type]
        else:
            value = b.op(node.op_type, [value, *node.inputs[1:]], shape, None, "", **_plain(node))  # type: ignore[list-item]
    return value


def _plain(node: ir.Node) -> dict[str, int | float | str | list[int]]:
    return {name: attribute.value for name, attribute in node.attributes.items()}
