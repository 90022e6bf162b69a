"""Matmuls by the matrices of chosen experts as nodes of the CPU library, which reads them where they lie.

A Gather would copy the weights in every step.
"""

from __future__ import annotations

import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.cpu_nodes import ExpertLinear
from sinkexport.graph.edit import is_weight, operand, replace_node
from sinkexport.graph.expert_matmuls import ExpertMatmul, find_expert_matmuls, rows_of_outputs
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.matmuls import module_of
from sinkexport.graph.packed_weights import PackedMatrix, packed_integers

FLOAT = ir.DataType.FLOAT


class UseCpuExperts(GraphPass):
    """Hand over every float32 matmul by chosen experts: FloatExpertLinear(x, picks, W), or Int8ExpertLinear or
    Bf16ExpertLinear where the plan rounds the matrices.

    x [R, K], picks int64 [P] -> [P, N]. Matmuls by all experts are done by the same node, each row by each expert once:
    the form of a matrix does not depend on the number of tokens, and decode and prefill read the same weights.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each with one node."""
        graph, modified = model.graph, False
        matmuls = list(find_expert_matmuls(graph))
        # A matrix that some matmul reads otherwise keeps its form for all of them.
        others = {m.weight for m in matmuls if not _fits(m)}
        for matmul in matmuls:
            if matmul.weight in others:
                continue
            b = Builder(graph)
            out = ExpertLinear.made(graph, matmul.x, operand(matmul.node, 2), self._matrix(matmul)).write(b)
            replace_node(matmul.node, b.nodes, [out])
            modified = True
        return ir.passes.PassResult(model, modified)

    def _matrix(self, matmul: ExpertMatmul) -> PackedMatrix:
        plan, (count, depth, width) = self.context.plan, matmul.sizes
        weight = None if plan is None else matmul.rounded(plan)
        packed = None if weight is None else packed_integers(weight, count)
        if packed is not None:
            return packed
        source = matmul.weight.const_value
        if source is None:
            raise ValueError(f"'{matmul.weight.name}' has no content")
        rows = rows_of_outputs(source, (count * width, depth), is_transposed=matmul.is_transposed)
        name = str(matmul.weight.name)
        is_bfloat16 = plan is not None and plan.is_bfloat16(module_of(name))
        return PackedMatrix(name, width, depth, rows.numpy, num_experts=count, is_bfloat16=is_bfloat16)


def _fits(matmul: ExpertMatmul) -> bool:
    if not matmul.in_place or matmul.picks is None or not is_weight(matmul.weight):
        return False
    return bool(matmul.x.dtype == matmul.weight.dtype == FLOAT)
