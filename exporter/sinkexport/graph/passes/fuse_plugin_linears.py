"""Additions, norms and gates beside matmuls of the TensorRT plugin, by the nodes of the matmuls.

A decoder layer of a step is then five launches: q | k | v with the norm before, attention, the matmul after it with the
residual, gate | up with norm and activation, down with the residual. What a node takes over is no longer rounded in
between: the sum of a residual is added before the only rounding, a gate is computed from sums of float32.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import drop_unused, known_shape, operand, replace_node
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.linear_fusion import is_only_input_of, source_of_rows, take_additions
from sinkexport.graph.operators import DOMAIN, GATED_ACTIVATION, RMS_NORM
from sinkexport.graph.plugin_linears import GATE_MULTIPLE, PluginLinear, find_plugin_linears, is_plugin_linear


class FusePluginLinears(GraphPass):
    """A linear takes over a norm that only linears read, what is added to its result, and a gate of its halves.

    To be run before norms become nodes, which would take the additions, and once more after norms and gates have.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse one after the other until none is left."""
        graph = model.graph
        modified = drop_unused(graph)  # a view that nothing reads would stand in the way
        for node, linear in find_plugin_linears(graph):
            modified |= take_additions(graph, node, linear, is_plugin_linear)
        for node, linear in find_plugin_linears(graph):
            modified |= _take_norm(graph, node, linear)
        for node in list(graph):
            modified |= node.domain == DOMAIN and node.op_type == GATED_ACTIVATION and _give_gate(graph, node)
        drop_unused(graph)
        return ir.passes.PassResult(model, modified)


def _take_norm(graph: ir.Graph, node: ir.Node, linear: PluginLinear) -> bool:
    norm = source_of_rows(linear.x)
    if linear.norm_weight is not None or norm is None or norm.domain != DOMAIN or norm.op_type != RMS_NORM:
        return False
    if norm.attributes["has_residual"].as_int() or not is_only_input_of(norm.outputs[0], is_plugin_linear):
        return False
    b = Builder(graph)
    fused = dataclasses.replace(
        linear,
        x=b.reshape(operand(norm, 0), known_shape(linear.x)),
        norm_weight=operand(norm, 1),
        norm_epsilon=norm.attributes["epsilon"].as_float(),
    )
    replace_node(node, b.nodes, [fused.write(b)])
    return True


def _give_gate(graph: ir.Graph, gate: ir.Node) -> bool:
    both = operand(gate, 0)
    node = both.producer()
    if not gate.attributes["is_merged"].as_int() or node is None or not is_plugin_linear(node):
        return False
    linear = PluginLinear.of(node)
    if both.is_graph_output() or len(list(both.uses())) > 1 or not linear.is_bare:
        return False
    if linear.num_outputs % (2 * GATE_MULTIPLE):
        return False
    b = Builder(graph)
    fused = dataclasses.replace(linear, gate=gate.attributes["activation"].as_int())
    replace_node(gate, b.nodes, [fused.write(b)])
    return True
