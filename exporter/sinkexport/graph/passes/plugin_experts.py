"""Products by the matrices of chosen experts as nodes of the TensorRT plugin, which reads them where they lie.

A Gather would copy the weights in every step, and TensorRT 8.5 has no kernel for products by what it gathered.
"""

from __future__ import annotations

import onnx_ir as ir

from sinkexport.graph.attention.parts import operand
from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape, lazy_weight, replace_node
from sinkexport.graph.operators import DOMAIN, HALF_EXPERT_LINEAR, INT8_EXPERT_LINEAR
from sinkexport.graph.passes.experts import ExpertProduct, find_expert_products, rows_of_outputs
from sinkexport.graph.passes.plugin_operators import PLUGIN_ATTRIBUTES
from sinkexport.graph.quantize.plugin import INPUTS_MULTIPLE, packed_rows, row_scales
from sinkexport.graph.quantize.rewrite import Plan

HALF = ir.DataType.FLOAT16


def use_expert_plugins(model: ir.Model, plan: Plan | None) -> None:
    """Every product that was traced for it: HalfExpertLinear(x, W, picks), or, where the plan rounds the matrices and
    their K is a multiple of 16, Int8ExpertLinear(x, W, scale, picks). x [R, K], picks int32 [P] -> [P, N], float16.

    W lies in the file as [E, N, K], whatever the model's orientation, int8 as int32 [E, N, K/4]; scale float32 [E, N].
    The form of a matrix does not depend on P: decode and prefill read the same weights.
    """
    graph = model.graph
    narrow: dict[ir.Value, ir.Value] = {}  # picks, int64 -> int32
    laid_out: dict[ir.Value, ir.Value] = {}  # matrices [E, K, N] -> [E, N, K]
    for product in find_expert_products(graph):
        if not product.in_place:
            continue
        b, picks, (count, depth, width) = Builder(graph), operand(product.node, 2), product.sizes
        if picks not in narrow:
            narrow[picks] = b.cast(picks, ir.DataType.INT32)
        weight = None if plan is None or depth % INPUTS_MULTIPLE else product.rounded(plan)
        if weight is None:
            op_type, matrices = HALF_EXPERT_LINEAR, [_rows(graph, product, laid_out)]
        else:
            op_type = INT8_EXPERT_LINEAR
            matrices = [write(graph, weight, (count, width)) for write in (packed_rows, row_scales)]
        out = b.op(
            op_type,
            [product.x, *matrices, narrow[picks]],
            known_shape(product.result),
            HALF,
            domain=DOMAIN,
            num_outputs=width,
            **PLUGIN_ATTRIBUTES,
        )
        replace_node(product.node, b.nodes, [out])
    if read := [value.name for value in laid_out if value.uses()]:
        raise ValueError(f"'{read[0]}' is read by something else")


def _rows(graph: ir.Graph, product: ExpertProduct, laid_out: dict[ir.Value, ir.Value]) -> ir.Value:
    """The matrices as [E, N, K], under the name that the model has for them."""
    weight = product.weight
    if not product.is_transposed:
        return weight
    if weight not in laid_out:
        name, (count, depth, width) = str(weight.name), product.sizes
        source = graph.initializers.pop(name).const_value
        if source is None:
            raise ValueError(f"'{name}' has no content")
        rows = rows_of_outputs(source, (count * width, depth), is_transposed=True)
        laid_out[weight] = lazy_weight(
            graph, name, HALF, (count, width, depth), lambda: rows.numpy().reshape(count, width, depth)
        )
    return laid_out[weight]
