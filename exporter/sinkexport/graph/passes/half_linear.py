"""Products by float16 weights as HalfLinear nodes of the TensorRT plugin, which reads them at the speed of memory."""

from __future__ import annotations

import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape, lazy_weight, replace_node
from sinkexport.graph.matmuls import Product, find_products
from sinkexport.graph.operators import DOMAIN, HALF_LINEAR
from sinkexport.graph.passes.plugin_operators import PLUGIN_ATTRIBUTES
from sinkexport.graph.passes.weights import bias_addition, weight_operand

INPUTS_MULTIPLE = 8
MAX_FEATURES = 1 << 21
"""What the kernel takes (plugins/kernels/linear.h): it reads 8 weights at once."""


def use_half_linear(model: ir.Model) -> None:
    """Every product by a constant float16 matrix that the kernel takes, with its bias: HalfLinear(x, W^T, bias).

    W^T lies in the file as the model holds it, [N, K]; a table that is also an embedding stays one tensor. To be called
    when quantisation has taken its products.
    """
    graph = model.graph
    for product in list(find_products(graph)):
        sizes = (product.depth, product.width)
        is_half = product.dtype == product.weight.dtype == ir.DataType.FLOAT16
        if is_half and product.depth % INPUTS_MULTIPLE == 0 and max(sizes) <= MAX_FEATURES:
            _replace(graph, product)


def _replace(graph: ir.Graph, product: Product) -> None:
    result = product.node.outputs[0]
    addition = bias_addition(result)
    bias = weight_operand(addition)
    if bias is not None and bias.dtype != product.dtype:
        addition = bias = None
    weight = product.weight if product.is_table else _rows(graph, product)
    b = Builder(graph)
    out = b.op(
        HALF_LINEAR,
        [product.x, weight, *([] if bias is None else [bias])],
        known_shape(result),
        product.dtype,
        domain=DOMAIN,
        num_outputs=product.width,
        has_bias=int(bias is not None),
        **PLUGIN_ATTRIBUTES,
    )
    replace_node(product.node if addition is None else addition, b.nodes, [out])
    if addition is not None:
        graph.remove(product.node, safe=True)


def _rows(graph: ir.Graph, product: Product) -> ir.Value:
    """W^T [N, K] under the name that the model has for it, which nothing but the transpose of it has read."""
    name = "+".join(name for name, _ in product.rows)
    unread = graph.initializers.pop(name, None)
    if unread is not None and unread.uses():
        raise ValueError(f"'{name}' is read by something else")
    return lazy_weight(graph, name, ir.DataType.FLOAT16, (product.width, product.depth), product.transposed.numpy)
