"""Leave attention to the CPU library: SinkAttention stays one node, which writes its states in place.

What its kernel does not do stays traced, and is written out in standard operators by the next pass: latent caches,
weights that are changed after the softmax, and rotations of other kinds.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sinkexport.graph.cpu_nodes import is_cpu_node
from sinkexport.graph.edit import drop_unused, known_shape, operand, optional
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.operators import DOMAIN, INT4_LINEAR, INT8_LINEAR, SINK_ATTENTION, VERSION, Input
from sinkexport.graph.turned_weights import find_turned_weight
from sinkexport.graph.whole_attention import HANDS_OUT, Shared, States, make_whole, rotation_of, rotations_of

FLOAT = ir.DataType.FLOAT
DIM_MULTIPLE, MAX_DIM = 8, 1024
"""Sizes of heads that the kernel takes: plugins/cpu/kernels/sink_attention.h."""

OTHERS = (Input.AFFINE_SCALE, Input.AFFINE_BIAS, Input.ATTENTION_MASS, Input.CALIBRATED)
"""Inputs that the kernel has not."""


class UseCpuAttention(GraphPass):
    """Give every traced SinkAttention that the kernel can do its inputs and attributes.

    Where weights are rounded, chunks may multiply in bfloat16: ``bfloat16_chunks``. Of nodes that share states one
    writes them, the others are ``reads_only``.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each with one node."""
        graph = model.graph
        groups: dict[ir.Value, list[ir.Node]] = {}
        for node in graph:
            if node.domain == DOMAIN and node.op_type == SINK_ATTENTION and not is_cpu_node(node):
                groups.setdefault(operand(node, Input.WINDOW_K), []).append(node)
        fitting = [nodes for nodes in groups.values() if all(map(_fits, nodes)) and _can_share(nodes)]
        if not fitting:
            return ir.passes.PassResult(model, False)
        drop_unused(graph)  # a view that nothing reads would hide an output's gate
        is_rounded = any(node.domain == DOMAIN and node.op_type in (INT8_LINEAR, INT4_LINEAR) for node in graph)
        for nodes in fitting:
            if self.context.verifies:
                _replace_verifying(graph, nodes)
            else:
                _replace_all(graph, nodes, is_rounded=is_rounded)
        graph.opset_imports[DOMAIN] = VERSION
        drop_unused(graph)  # rotations and angles
        return ir.passes.PassResult(model, True)


def _replace_all(graph: ir.Graph, nodes: list[ir.Node], *, is_rounded: bool) -> None:
    """Replace nodes that have the same states, in order.

    A step's first node writes, the others read what it wrote. The first tokens of a chunk still see keys that the last
    ones evict: there the last node writes, and the others take the chunk's keys and values themselves.
    """
    is_chunk = _is_chunk(nodes[0])
    writer = nodes[-1] if is_chunk else nodes[0]
    others = [node for node in nodes if node is not writer]
    for node in others:
        for old, new in zip(node.outputs[1:], writer.outputs[1:], strict=True):
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    states = States.of(writer)
    written = _replace(graph, writer, None, is_rounded=is_rounded)
    shared = Shared(states if is_chunk else states.after(written), takes_keys=is_chunk)
    for node in others:
        _replace(graph, node, shared, is_rounded=is_rounded)


def _replace_verifying(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    """Replace nodes that have the same states. None writes them: the last hands out the rows that it would write."""
    *others, owner = nodes
    for node in others:
        for old, new in zip(node.outputs[1:], owner.outputs[1:], strict=True):
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    states = States.of(owner)
    # Whether a draft is accepted depends on logits alone: they are not rounded further than a step's.
    _replace(graph, owner, Shared(states, takes_keys=True, hands_out=True), is_rounded=False)
    for node in others:
        _replace(graph, node, Shared(states, takes_keys=True), is_rounded=False)


def _replace(graph: ir.Graph, node: ir.Node, shared: Shared | None, *, is_rounded: bool) -> ir.Node:
    turned = find_turned_weight(node)
    # Norms are fused by a pass that runs later.
    norms: dict[str, int | float] = {"qk_norm": 0, "qk_norm_epsilon": 0.0, "has_v_norm": 0, "v_norm_epsilon": 0.0}
    fields = {
        "bfloat16_chunks": int(is_rounded),
        "reads_only": 0 if shared is None else HANDS_OUT if shared.hands_out else 1,
        "turned_weights": 0 if turned is None else len(turned.weights),
        **norms,
    }
    frequency = np.dtype(np.int64)
    return make_whole(graph, node, dtype=FLOAT, frequency=frequency, fields=fields, turned=turned, shared=shared)


def _is_chunk(node: ir.Node) -> bool:
    return known_shape(operand(node, Input.Q))[2] > 1


def _can_share(nodes: list[ir.Node]) -> bool:
    """Whether nodes that have the same states have the same keys and values, and the last comes after the others."""
    first, last = nodes[0], nodes[-1]
    for node in nodes[1:]:
        if operand(node, Input.V) is not operand(first, Input.V):
            return False
        keys, others = operand(node, Input.K), operand(first, Input.K)
        if keys is others:
            continue
        rotations = rotation_of(keys), rotation_of(others)
        if any(r is None for r in rotations):
            return False
        one, other = rotations
        if one is None or other is None or one.x is not other.x or not one.is_like(other):
            return False
    return len(nodes) == 1 or not _is_chunk(first) or _come_before(nodes[:-1], operand(last, Input.Q))


def _come_before(nodes: list[ir.Node], value: ir.Value) -> bool:
    """Whether a value is computed of the results of all nodes."""
    waiting, seen = [value], set()
    while waiting:
        node = waiting.pop().producer()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [each for each in node.inputs if each is not None]
    return all(node in seen for node in nodes)


def _fits(node: ir.Node) -> bool:
    """Whether the kernel can do it."""
    q, values, window_v = (optional(node, i) for i in (Input.Q, Input.V, Input.WINDOW_V))
    if q is None or values is None or window_v is None or q.dtype != FLOAT or values.dtype != FLOAT:
        return False
    if any(optional(node, i) is not None for i in OTHERS):
        return False
    if any(known_shape(value)[3] % DIM_MULTIPLE or known_shape(value)[3] > MAX_DIM for value in (q, values)):
        return False
    sinks = [optional(node, i) for i in (Input.SINK_K, Input.SINK_V)]
    if any(state is not None and state.dtype != FLOAT for state in sinks):
        return False
    try:
        rotations_of(node, find_turned_weight(node))
    except ValueError:
        return False
    return True
