"""RMS norms in front of matmuls, by the CPU library's nodes of the matmuls."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.cpu_nodes import BITS_OF_LINEARS, find_linears
from sinkexport.graph.edit import drop_unused, known_shape, operand, replace_node
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.operators import DOMAIN

FLOAT = ir.DataType.FLOAT


class FuseCpuNorms(GraphPass):
    """A linear whose input is an RMSNormalization that only linears read does the norm itself."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse each norm into all of its readers."""
        graph = model.graph
        modified = drop_unused(graph)
        for node, linear in find_linears(graph):
            norm = _norm(linear.x)
            if norm is None or linear.norm_weight is not None:
                continue
            b = Builder(graph)
            x = b.reshape(operand(norm, 0), known_shape(linear.x))
            epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
            fused = dataclasses.replace(linear, x=x, norm_weight=operand(norm, 1), norm_epsilon=epsilon)
            replace_node(node, b.nodes, [fused.write(b)])
            modified = True
        drop_unused(graph)
        return ir.passes.PassResult(model, modified)


def _norm(x: ir.Value) -> ir.Node | None:
    """The norm over the last axis that makes x, maybe through a view; None: it is of another kind, or is read by
    something else."""
    node = x.producer()
    if node is not None and node.op_type == "Reshape" and not node.domain and _are_linears(x):
        source = node.inputs[0]
        if source is None or known_shape(source)[-1:] != known_shape(x)[-1:] or len(list(source.uses())) > 1:
            return None
        node = source.producer()
    elif not _are_linears(x):
        return None
    if node is None or node.op_type != "RMSNormalization" or node.domain or node.outputs[0].is_graph_output():
        return None
    value, scale = operand(node, 0), operand(node, 1)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    rank = len(known_shape(value))
    is_plain = axis in (-1, rank - 1) and known_shape(scale) == known_shape(value)[-1:]
    return node if is_plain and value.dtype == scale.dtype == FLOAT else None


def _are_linears(x: ir.Value) -> bool:
    """Whether all that reads x is the input of a linear."""
    return not x.is_graph_output() and all(
        use.node.domain == DOMAIN and use.node.op_type in BITS_OF_LINEARS and use.idx == 0 for use in x.uses()
    )
