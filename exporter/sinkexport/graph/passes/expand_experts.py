"""Matmuls of MoE experts in standard operators."""

from __future__ import annotations

import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape, replace_node
from sinkexport.graph.expert_matmuls import chosen_rows, find_expert_matmuls, inputs_by_expert
from sinkexport.graph.graph_pass import GraphPass


class ExpandExperts(GraphPass):
    """Write out every ExpertMatmul that is left. A matrix is transposed nowhere, its inputs are."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Gather the chosen experts' matrices, or take all, and multiply."""
        found = list(find_expert_matmuls(model.graph))
        for matmul in found:
            b = Builder(model.graph)
            x, weight = inputs_by_expert(b, matmul), chosen_rows(b, matmul.weight, matmul.picks)
            out = b.matmul(x, weight) if matmul.is_transposed else _transposed(b, b.matmul(weight, _transposed(b, x)))
            replace_node(matmul.node, b.nodes, [b.reshape(out, known_shape(matmul.result))])
        return ir.passes.PassResult(model, bool(found))


def _transposed(b: Builder, value: ir.Value) -> ir.Value:
    first, rows, columns = known_shape(value)
    return b.op("Transpose", [value], (first, columns, rows), value.dtype, perm=[0, 2, 1])
