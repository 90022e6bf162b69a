"""Activations of a matmul's result, and gates of feed-forward blocks, by the CPU library's node of the matmul.

The rows gate | up of a gated block are packed in alternating tiles: one thread has both halves of its results.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.cpu_nodes import BITS_OF_LINEARS, Linear
from sinkexport.graph.edit import drop_unused, known_shape, only_user, replace_node, split_source
from sinkexport.graph.gates import Gate, find_activations, gate_of
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.operators import DOMAIN


class FuseCpuActivations(GraphPass):
    """A linear whose result alone an activation reads, or whose halves are gate and up of one, does it itself."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each linear and what follows it with one node."""
        graph = model.graph
        modified = drop_unused(graph)  # a view that nothing reads would stand in the way
        for active in find_activations(graph):
            gate = gate_of(active)
            fused = None if gate is None else _gated(graph, gate)
            last = active.last if gate is None else gate.last
            if fused is None:
                fused, last = _plain(active.x, active.activation), active.last
            if fused is not None:
                b = Builder(graph)
                replace_node(last, b.nodes, [b.reshape(fused.write(b), known_shape(last.outputs[0]))])
                drop_unused(graph)
                modified = True
        return ir.passes.PassResult(model, modified)


def _plain(x: ir.Value, activation: str) -> Linear | None:
    """The linear that makes x, with the activation; None: no linear does, or something else reads x."""
    readers = {use.node for use in x.uses()}
    linear = _linear(x)
    if linear is None or x.is_graph_output() or len(readers) > (2 if activation == "silu" else 1):
        return None
    return dataclasses.replace(linear, activation=activation)


def _gated(graph: ir.Graph, gate: Gate) -> Linear | None:
    """The linear whose halves are gate and up, its weights in alternating tiles."""
    whole = split_source([gate.gate, gate.up])
    linear = None if whole is None or only_user(whole, "Split") is None else _linear(whole)
    matrix = None if linear is None else linear.matrix
    if linear is None or matrix is None or any(len(list(value.uses())) > 1 for value in linear.weights):
        return None
    for value in linear.weights:
        graph.initializers.pop(str(value.name))
    weights = tuple(dataclasses.replace(matrix, is_gated=True).values(graph))
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
    if node is None or node.domain != DOMAIN or node.op_type not in BITS_OF_LINEARS:
        return None
    linear = Linear.of(node)
    return linear if linear.is_bare else None
