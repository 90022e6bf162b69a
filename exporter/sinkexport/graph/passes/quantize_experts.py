"""Matmuls of MoE experts with INT8 weights, for ONNX Runtime.

Every expert's matrix is uint8 with zero point 128 and a scale for each output, gathered as it is where few tokens are
decoded. No operator multiplies gathered integers by floating-point inputs, so inputs are integers too, of 15 bits:
128 * high + low, two rows of one MatMulInteger, which reads the weights once. That loses 3e-5 of a result, and takes
less than half the time of gathered float32 weights, whose copies cost more than the matmuls.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import constant, known_shape, lazy_weight, replace_node
from sinkexport.graph.expert_matmuls import ExpertMatmul, chosen_rows, find_expert_matmuls, inputs_by_expert
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.model.attention import TINY
from sinkexport.quant.weight import QuantizedWeight

FLOAT = ir.DataType.FLOAT
STEPS = 128
"""Steps of the low part in one of the high part; the zero point of both, and of the weights."""

HIGHEST = 127 * STEPS
"""Largest integer of an input: the high part is a signed byte, the low one is at most half a step of it."""


class QuantizeExperts(GraphPass):
    """Round the experts' matrices that the plan names. Without a plan nothing changes."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Write each with integer inputs and weights."""
        plan, modified = self.context.plan, False
        for matmul in find_expert_matmuls(model.graph):
            weight = None if plan is None else matmul.rounded(plan)
            if weight is not None:
                _write(model.graph, matmul, weight)
                modified = True
        return ir.passes.PassResult(model, modified)


def _write(graph: ir.Graph, matmul: ExpertMatmul, weight: QuantizedWeight) -> None:
    b, result = Builder(graph), matmul.result
    count, depth, width = matmul.sizes

    def integers() -> np.ndarray:
        return np.ascontiguousarray(weight.unsigned().reshape(count, width, depth).transpose(0, 2, 1))

    matrices = lazy_weight(graph, f"{weight.name}.uint8", ir.DataType.UINT8, (count, depth, width), integers)
    scales = lazy_weight(
        graph,
        f"{weight.name}.scales",
        FLOAT,
        (count, 1, width),
        lambda: weight.scales().astype(np.float32).reshape(count, 1, width),
    )
    matrices, scales = (chosen_rows(b, part, matmul.picks) for part in (matrices, scales))
    x = b.cast(inputs_by_expert(b, matmul), FLOAT)
    first, tokens, _ = known_shape(x)
    # The scale of each token, and its numbers in units of it.
    largest = b.op("ReduceMax", [b.op("Abs", [x]), b.ints([-1], "last_axis")], (first, tokens, 1), FLOAT, keepdims=1)
    step = b.op("Max", [b.op("Div", [largest, b.scalar(float(HIGHEST), FLOAT)]), b.scalar(TINY, FLOAT)])
    units = b.op("Round", [b.op("Div", [x, step])])
    steps = b.scalar(float(STEPS), FLOAT)
    high = b.op("Round", [b.op("Div", [units, steps])])
    low = b.op("Sub", [units, b.op("Mul", [high, steps])])
    parts = b.op("Concat", [high, low], (first, 2 * tokens, depth), FLOAT, axis=1)
    unsigned = b.cast(b.op("Add", [parts, steps]), ir.DataType.UINT8)
    zero = constant(graph, np.asarray(STEPS, np.uint8), "zero_point")
    experts = known_shape(matrices)[0]
    sums = b.op("MatMulInteger", [unsigned, matrices, zero, zero], (experts, 2 * tokens, width), ir.DataType.INT32)
    of_high, of_low = b.split(b.cast(sums, FLOAT), [tokens, tokens], 1)
    out = b.op("Add", [b.op("Mul", [of_high, steps]), of_low])
    out = b.reshape(b.op("Mul", [b.op("Mul", [out, step]), scales]), known_shape(result))
    replace_node(matmul.node, b.nodes, [b.cast(out, result.dtype or FLOAT)])
