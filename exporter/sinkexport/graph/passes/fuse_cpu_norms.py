"""RMS norms and layer norms in front of matmuls, by the CPU library's nodes of the matmuls."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.cpu_nodes import find_expert_linears, find_linears, is_expert_linear, is_linear
from sinkexport.graph.edit import drop_unused, known_shape, operand, optional, replace_node
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.linear_fusion import is_only_input_of, source_of_rows
from sinkexport.graph.rms_norms import row_norm

FLOAT = ir.DataType.FLOAT


class FuseCpuNorms(GraphPass):
    """A linear whose input is a norm that only linears read does the norm itself."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse each norm into all of its readers."""
        graph = model.graph
        modified = drop_unused(graph)
        for node, linear in find_linears(graph):
            norm = _norm(linear.x)
            if norm is None or linear.norm_weight is not None:
                continue
            b = Builder(graph)
            x = b.reshape(norm.x, known_shape(linear.x))
            fused = dataclasses.replace(
                linear,
                x=x,
                norm_weight=norm.weight,
                norm_epsilon=norm.epsilon,
                norm_bias=norm.bias,
                is_layer_norm=norm.is_layer_norm,
            )
            replace_node(node, b.nodes, [fused.write(b)])
            modified = True
        for node, experts in find_expert_linears(graph):
            norm = _norm(experts.x)
            if norm is None or norm.bias is not None or experts.norm_weight is not None:
                continue
            b = Builder(graph)
            fused_experts = dataclasses.replace(
                experts,
                x=norm.x,
                norm_weight=norm.weight,
                norm_epsilon=norm.epsilon,
                is_layer_norm=norm.is_layer_norm,
            )
            replace_node(node, b.nodes, [fused_experts.write(b)])
            modified = True
        drop_unused(graph)
        return ir.passes.PassResult(model, modified)


@dataclasses.dataclass(frozen=True)
class _Norm:
    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    epsilon: float
    is_layer_norm: bool


def _norm(x: ir.Value) -> _Norm | None:
    """The norm over the last axis that makes x, maybe through views; None: it is of another kind, or is read by
    something else."""
    node = source_of_rows(x)
    if node is None or node.domain or not is_only_input_of(node.outputs[0], _is_linear):
        return None
    rms = row_norm(node)
    return _layer_norm(node) if rms is None else _Norm(rms.x, rms.scale, None, rms.epsilon, is_layer_norm=False)


def _layer_norm(node: ir.Node) -> _Norm | None:
    if node.op_type != "LayerNormalization" or any(output.uses() for output in node.outputs[1:]):
        return None
    x, weight, bias = operand(node, 0), operand(node, 1), optional(node, 2)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    shape = known_shape(x)
    given = [weight] if bias is None else [weight, bias]
    if axis not in (-1, len(shape) - 1) or any(known_shape(value) != shape[-1:] for value in given):
        return None
    if any(value.dtype != FLOAT for value in (x, *given)):
        return None
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    return _Norm(x, weight, bias, epsilon, is_layer_norm=True)


def _is_linear(node: ir.Node) -> bool:
    return is_linear(node) or is_expert_linear(node)
