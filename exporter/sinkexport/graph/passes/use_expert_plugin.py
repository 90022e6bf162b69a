"""Matmuls by the matrices of chosen experts as nodes of the TensorRT plugin, which reads them where they lie.

A Gather would copy the weights in every step, and TensorRT 8.5 has no kernel for matmuls by what it gathered.
"""

from __future__ import annotations

import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape, lazy_weight, operand, replace_node
from sinkexport.graph.expert_matmuls import ExpertMatmul, find_expert_matmuls, rows_of_outputs
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.operators import DOMAIN, HALF_EXPERT_LINEAR, INT4_EXPERT_LINEAR, INT8_EXPERT_LINEAR
from sinkexport.graph.plugin_nodes import PLUGIN_ATTRIBUTES
from sinkexport.graph.quantize.plugin import INPUTS_MULTIPLE, int4_constants, packed_rows, row_scales

HALF = ir.DataType.FLOAT16


class UseExpertPlugin(GraphPass):
    """Hand over every matmul that was traced for it: HalfExpertLinear(x, W, picks), or Int8ExpertLinear(x, W, scale,
    picks) or Int4ExpertLinear(x, W, scale, zero points, picks) where the plan rounds the matrices and their K is a
    multiple of 16.

    x [R, K], picks int32 [P] -> [P, N], float16. W lies in the file as [E, N, K], whatever the model's orientation,
    int8 as int32 [E, N, K/4]; scale float32 [E, N]. INT4 weights: sinkexport.graph.quantize.int4_tiles. The form of a
    matrix does not depend on P: decode and prefill read the same weights.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each with one node.

        Raises: ValueError if something else reads a matrix.
        """
        graph, plan, modified = model.graph, self.context.plan, False
        narrow: dict[ir.Value, ir.Value] = {}  # picks, int64 -> int32
        laid_out: dict[ir.Value, ir.Value] = {}  # matrices [E, K, N] -> [E, N, K]
        for matmul in find_expert_matmuls(graph):
            if not matmul.in_place:
                continue
            b, picks, (count, depth, width) = Builder(graph), operand(matmul.node, 2), matmul.sizes
            if picks not in narrow:
                narrow[picks] = b.cast(picks, ir.DataType.INT32)
            weight = None if plan is None or depth % INPUTS_MULTIPLE else matmul.rounded(plan)
            fields: dict[str, int] = {}
            if weight is None:
                op_type, matrices = HALF_EXPERT_LINEAR, [_rows(graph, matmul, laid_out)]
            elif weight.scheme.bits == 4:
                op_type, (matrices, fields) = INT4_EXPERT_LINEAR, int4_constants(graph, weight, (count, width))
            else:
                op_type = INT8_EXPERT_LINEAR
                matrices = [write(graph, weight, (count, width)) for write in (packed_rows, row_scales)]
            out = b.op(
                op_type,
                [matmul.x, *matrices, narrow[picks]],
                known_shape(matmul.result),
                HALF,
                domain=DOMAIN,
                num_outputs=width,
                **fields,
                **PLUGIN_ATTRIBUTES,
            )
            replace_node(matmul.node, b.nodes, [out])
            modified = True
        if read := [value.name for value in laid_out if value.uses()]:
            raise ValueError(f"'{read[0]}' is read by something else")
        return ir.passes.PassResult(model, modified)


def _rows(graph: ir.Graph, matmul: ExpertMatmul, laid_out: dict[ir.Value, ir.Value]) -> ir.Value:
    """The matrices as [E, N, K], under the name that the model has for them."""
    weight = matmul.weight
    if not matmul.is_transposed:
        return weight
    if weight not in laid_out:
        name, (count, depth, width) = str(weight.name), matmul.sizes
        source = graph.initializers.pop(name).const_value
        if source is None:
            raise ValueError(f"'{name}' has no content")
        rows = rows_of_outputs(source, (count * width, depth), is_transposed=True)
        laid_out[weight] = lazy_weight(
            graph, name, HALF, (count, width, depth), lambda: rows.numpy().reshape(count, width, depth)
        )
    return laid_out[weight]
