"""Matmuls by float16 weights as HalfLinear nodes of the TensorRT plugin, which reads them at the speed of memory."""

from __future__ import annotations

import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import lazy_weight, replace_node
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.matmuls import Matmul, bias_addition, find_matmuls, weight_operand
from sinkexport.graph.operators import HALF_LINEAR
from sinkexport.graph.plugin_linears import PluginLinear

INPUTS_MULTIPLE = 8
MAX_FEATURES = 1 << 21
"""What the kernel takes (plugins/kernels/linear.h): it reads 8 weights at once."""


class UseLinearPlugin(GraphPass):
    """Hand over every matmul by a constant float16 matrix that the kernel takes, bias included: HalfLinear(x, W^T, b).

    W^T lies in the file as the model holds it, [N, K]; a table that is also an embedding stays one tensor.
    Quantisation must have taken its matmuls.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each with one node."""
        graph, modified = model.graph, False
        for matmul in list(find_matmuls(graph)):
            sizes = (matmul.depth, matmul.width)
            is_half = matmul.dtype == matmul.weight.dtype == ir.DataType.FLOAT16
            if is_half and matmul.depth % INPUTS_MULTIPLE == 0 and max(sizes) <= MAX_FEATURES:
                _replace(graph, matmul)
                modified = True
        return ir.passes.PassResult(model, modified)


def _replace(graph: ir.Graph, matmul: Matmul) -> None:
    result = matmul.node.outputs[0]
    addition = bias_addition(result)
    bias = weight_operand(addition)
    if bias is not None and bias.dtype != matmul.dtype:
        addition = bias = None
    weight = matmul.weight if matmul.is_table else _rows(graph, matmul)
    b = Builder(graph)
    linear = PluginLinear(op_type=HALF_LINEAR, x=matmul.x, weights=(weight,), num_outputs=matmul.width, bias=bias)
    out = linear.write(b)
    replace_node(matmul.node if addition is None else addition, b.nodes, [out])
    if addition is not None:
        graph.remove(matmul.node, safe=True)


def _rows(graph: ir.Graph, matmul: Matmul) -> ir.Value:
    """W^T [N, K] under the name that the model has for it, which nothing but the transpose of it has read."""
    name = "+".join(name for name, _ in matmul.rows)
    unread = graph.initializers.pop(name, None)
    if unread is not None and unread.uses():
        raise ValueError(f"'{name}' is read by something else")
    return lazy_weight(graph, name, ir.DataType.FLOAT16, (matmul.width, matmul.depth), matmul.transposed.numpy)
