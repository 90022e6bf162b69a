"""Activations of a matmul's result, and gates of feed-forward blocks, by the CPU library's node of the matmul.

The rows gate | up of a gated block are packed in alternating tiles: one thread has both halves of its results.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.cpu_fusion import repacked
from sinkexport.graph.cpu_nodes import Linear, find_linears, is_linear
from sinkexport.graph.edit import drop_unused, known_shape, only_user, replace_node, split_source
from sinkexport.graph.gates import Gate, gate_of
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.spelled_activations import find_activations_of


class FuseCpuActivations(GraphPass):
    """A linear whose result alone an activation reads, or whose halves are gate and up of one, does it itself."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each linear and what follows it with one node."""
        graph = model.graph
        modified = drop_unused(graph)  # a view that nothing reads would stand in the way
        for x in _results(graph):
            modified |= _fuse(graph, x)
        return ir.passes.PassResult(model, modified)


def _results(graph: ir.Graph) -> list[ir.Value]:
    """What linears make, halves of it, and views of both."""
    found = []
    for node, _ in find_linears(graph):
        pending = [node.outputs[0]]
        while pending:
            value = pending.pop()
            found.append(value)
            reader = only_user(value)
            if reader is not None and reader.op_type in ("Reshape", "Split"):
                pending += reader.outputs
    return found


def _fuse(graph: ir.Graph, x: ir.Value) -> bool:
    for active, _ in list(find_activations_of(x)):
        gate = gate_of(active)
        fused = None if gate is None else _gated(graph, gate)
        last = active.last if gate is None or fused is None else gate.last
        if fused is None:
            linear = _linear(x)
            fused = None if linear is None else dataclasses.replace(linear, activation=active.activation)
        if fused is not None:
            b = Builder(graph)
            replace_node(last, b.nodes, [b.reshape(fused.write(b), known_shape(last.outputs[0]))])
            drop_unused(graph)
            return True
    return False


def _gated(graph: ir.Graph, gate: Gate) -> Linear | None:
    """The linear whose halves are gate and up, its weights in alternating tiles."""
    whole = split_source([gate.gate, gate.up])
    linear = None if whole is None or only_user(whole, "Split") is None else _linear(whole)
    matrix = None if linear is None else linear.matrix
    if linear is None or matrix is None or linear.shares_weights:
        return None
    weights = repacked(graph, linear, dataclasses.replace(matrix, is_gated=True))
    return dataclasses.replace(
        linear, weights=weights, out_features=linear.out_features // 2, activation=gate.activation, is_gated=True
    )


def _linear(value: ir.Value) -> Linear | None:
    """The linear that makes a value, nothing added to it but a bias."""
    node = value.producer()
    if node is not None and node.op_type == "Reshape" and not node.domain:
        source = node.inputs[0]
        alone = source is not None and only_user(source) is node
        node = source.producer() if source is not None and alone else None
    linear = Linear.of(node) if node is not None and is_linear(node) else None
    return linear if linear is not None and linear.is_bare else None
