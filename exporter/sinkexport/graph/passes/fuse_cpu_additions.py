"""Biases and residuals that are added to a matmul's result, by the CPU library's node of the matmul."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.cpu_fusion import absorb
from sinkexport.graph.cpu_nodes import (
    ExpertLinear,
    Linear,
    find_expert_linears,
    find_linears,
    is_expert_linear,
    is_linear,
)
from sinkexport.graph.edit import drop_unused, is_weight, known_shape, only_user, operand, replace_node
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.linear_fusion import take_additions

FLOAT = ir.DataType.FLOAT


class FuseCpuAdditions(GraphPass):
    """A linear whose only reader is an Add takes over what is added: constants [N], then a tensor of y's shape.

    Of two tensors that are added one after the other, the second goes to the matmul that made the first.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse one addition after the other until none is left."""
        graph = model.graph
        modified = drop_unused(graph)  # a view that nothing reads would stand in the way
        for node, linear in find_linears(graph):
            modified |= take_additions(graph, node, linear, is_linear)
        for node, linear in find_linears(graph):
            modified |= _moved_to_first(graph, node, linear)
        modified |= absorb(graph, find_expert_linears(graph), _with_addition_to_sums)
        return ir.passes.PassResult(model, modified)


def _moved_to_first(graph: ir.Graph, node: ir.Node, linear: Linear) -> bool:
    """Let the first of two matmuls add what follows the second: ``(a + b) + x`` becomes ``a + (b + x)``.

    A linear has one residual. Where blocks lie side by side (GPT-NeoX, Falcon) the second's is the first's result.
    """
    first = None if linear.residual is None else linear.residual.producer()
    result = node.outputs[0]
    addition = only_user(result, "Add")
    if first is not None and first.op_type == "Reshape" and only_user(operand(first, 0)) is first:
        view, first = first, operand(first, 0).producer()
        if not is_expert_linear(first) or len(list(view.outputs[0].uses())) > 1:
            return False
    if first is None or addition is None or len(list(first.outputs[0].uses())) > 1:
        return False
    before = Linear.of(first) if is_linear(first) else ExpertLinear.of(first) if is_expert_linear(first) else None
    if before is None:
        return False
    other = addition.inputs[1] if addition.inputs[0] is result else addition.inputs[0]
    if before.residual is not None or first.outputs[0].is_graph_output() or other is None or other is result:
        return False
    if other.dtype != FLOAT or is_weight(other) or known_shape(other) != known_shape(result):
        return False
    is_sum = isinstance(before, ExpertLinear) and before.pick_weights is not None
    if not is_sum and known_shape(first.outputs[0]) != known_shape(result):
        return False
    b = Builder(graph)
    between = dataclasses.replace(before, residual=other).write(b)  # what it reads is there: only `node` reads it
    out = dataclasses.replace(linear, residual=between).write(b)
    replace_node(addition, b.nodes, [out])
    drop_unused(graph)
    return True


def _with_addition_to_sums(node: ir.Node, experts: ExpertLinear) -> tuple[ir.Node, ExpertLinear] | None:
    """The Add that alone reads the sums of a token's experts, and the experts with what is added."""
    result = node.outputs[0]
    view = only_user(result, "Reshape")
    viewed = result if view is None else view.outputs[0]
    addition = only_user(viewed, "Add")
    if addition is None or experts.pick_weights is None or experts.residual is not None:
        return None
    other = addition.inputs[1] if addition.inputs[0] is viewed else addition.inputs[0]
    if other is None or other is viewed or other.dtype != FLOAT or is_weight(other):
        return None
    if known_shape(other) != known_shape(viewed) or known_shape(viewed)[-1] != experts.out_features:
        return None
    return addition, dataclasses.replace(experts, residual=other)
