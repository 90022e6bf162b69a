"""Find the matmuls of MoE experts (model/experts.py), and what the two passes that write them out share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import is_weight, known_shape, operand, optional
from sinkexport.graph.matmuls import module_of
from sinkexport.graph.operators import DOMAIN, EXPERT_MATMUL
from sinkexport.graph.quantize.plan import Plan, treatment_of_rows
from sinkexport.quant.weight import QuantizedWeight


@dataclasses.dataclass(frozen=True)
class ExpertMatmul:
    """A node of that name. model/experts.py gives shapes and meaning of its inputs."""

    node: ir.Node
    x: ir.Value
    weight: ir.Value
    picks: ir.Value | None
    is_transposed: bool
    in_place: bool

    @property
    def result(self) -> ir.Value:
        """[P, M], or [E, n, M] of all experts."""
        return self.node.outputs[0]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, K, M."""
        count, *axes = known_shape(self.weight)
        depth, width = axes if self.is_transposed else axes[::-1]
        return count, depth, width

    def rounded(self, plan: Plan) -> QuantizedWeight | None:
        """The matrices as the plan rounds them, as the rows of one, [E * M, K]; None: it does not."""
        name, source = str(self.weight.name), self.weight.const_value
        if source is None or not is_weight(self.weight):
            return None
        count, depth, width = self.sizes
        rows = rows_of_outputs(source, (count * width, depth), is_transposed=self.is_transposed)
        treatment = treatment_of_rows(plan, module_of(name), rows, "experts")
        if treatment is None:
            return None
        return QuantizedWeight(name, rows, treatment.scheme, transposed=True, rounded=treatment.rounded)


def find_expert_matmuls(graph: ir.Graph) -> Iterator[ExpertMatmul]:
    """All that are left in the graph. The node that is handed out may be replaced."""
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == EXPERT_MATMUL:
            flags = (bool(node.attributes[name].as_int()) for name in ("is_transposed", "in_place"))
            yield ExpertMatmul(node, operand(node, 0), operand(node, 1), optional(node, 2), *flags)


def inputs_by_expert(b: Builder, matmul: ExpertMatmul) -> ir.Value:
    """The inputs of each matrix: [P, 1, K], or of all experts [1 or E, n, K].

    They are repeated: ONNX Runtime on a GPU copies pointers from the host for a matmul whose operands are broadcast.
    """
    if matmul.picks is None:
        return matmul.x
    (count,), (rows, depth) = known_shape(matmul.picks), known_shape(matmul.x)
    x = matmul.x
    if rows < count:
        shape = (rows, count // rows, depth)
        x = b.op("Expand", [b.reshape(x, (rows, 1, depth)), b.ints(shape, "shape")], shape, x.dtype)
    return b.reshape(x, (count, 1, depth))


def chosen_rows(b: Builder, value: ir.Value, picks: ir.Value | None) -> ir.Value:
    """The rows `picks` of a value's first axis; None: all."""
    if picks is None:
        return value
    return b.op("Gather", [value, picks], (*known_shape(picks), *known_shape(value)[1:]), value.dtype, axis=0)


def rows_of_outputs(source: ir.TensorProtocol, shape: tuple[int, int], *, is_transposed: bool) -> ir.TensorProtocol:
    """The matrices [E, M, K], or [E, K, M] if `is_transposed`, as the rows of one, [E * M, K], made when it is read."""

    def make() -> ir.Tensor[Any]:
        array = source.numpy().transpose(0, 2, 1) if is_transposed else source.numpy()
        return ir.Tensor(np.ascontiguousarray(array).reshape(shape))

    return ir.LazyTensor(make, dtype=source.dtype, shape=ir.Shape(shape), name=source.name)
