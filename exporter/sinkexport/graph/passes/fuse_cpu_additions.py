"""Biases and residuals that are added to a matmul's result, by the CPU library's node of the matmul."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.cpu_nodes import Linear, find_linears
from sinkexport.graph.edit import drop_unused, is_weight, known_shape, only_user, replace_node
from sinkexport.graph.graph_pass import GraphPass

FLOAT = ir.DataType.FLOAT


class FuseCpuAdditions(GraphPass):
    """A linear whose only reader is an Add takes over what is added: constants [N], then a tensor of y's shape."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse one addition after the other until none is left."""
        graph = model.graph
        modified = drop_unused(graph)  # a view that nothing reads would stand in the way
        for node, linear in find_linears(graph):
            while (found := _with_addition(node, linear)) is not None:
                addition, linear = found
                b = Builder(graph)
                out = linear.write(b)
                replace_node(addition, b.nodes, [b.reshape(out, known_shape(addition.outputs[0]))])
                drop_unused(graph)
                (node,) = (one for one in b.nodes if one.op_type == linear.op_type)
                modified = True
        return ir.passes.PassResult(model, modified)


def _with_addition(node: ir.Node, linear: Linear) -> tuple[ir.Node, Linear] | None:
    """The Add that alone reads a linear, and the linear with what is added."""
    result = node.outputs[0]
    if (view := only_user(result, "Reshape")) is not None:
        result = view.outputs[0]
    addition = only_user(result, "Add")
    if addition is None or linear.residual is not None:
        return None
    other = addition.inputs[1] if addition.inputs[0] is result else addition.inputs[0]
    if other is None or other is result or other.dtype != FLOAT:
        return None
    shape = known_shape(result)
    if is_weight(other) and known_shape(other) == shape[-1:] and linear.bias is None and linear.is_bare:
        return addition, dataclasses.replace(linear, bias=other)
    if known_shape(other) != shape or is_weight(other):
        return None
    if view is not None and known_shape(node.outputs[0]) != shape:
        return None
    return addition, dataclasses.replace(linear, residual=other)
