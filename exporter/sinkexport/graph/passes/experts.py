"""Products by the matrices of a mixture's experts: in standard operators, or with INT8 weights for ONNX Runtime.

There every expert's matrix is uint8 with zero point 128 and a scale for each output, gathered as it is where few tokens
are decoded. No operator multiplies gathered integers by floating-point inputs, so inputs are integers too, of 15 bits:
128 * high + low, two rows of one MatMulInteger, which reads the weights once. That loses 3e-5 of a product, and takes
less than half the time of gathered float32 weights, whose copies cost more than the products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from sinkexport.graph.attention.parts import operand, optional
from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import constant, is_weight, known_shape, lazy_weight, replace_node
from sinkexport.graph.matmuls import module_of
from sinkexport.graph.operators import DOMAIN, EXPERT_PRODUCT
from sinkexport.graph.quantize.rewrite import Plan
from sinkexport.model.attention import TINY
from sinkexport.quant.weight import QuantizedWeight

FLOAT = ir.DataType.FLOAT
STEPS = 128
"""Of the low part to one of the high part; the zero point of both, and of the weights."""

HIGHEST = 127 * STEPS
"""Of an input: the high part is a signed byte, the low one is at most half a step of it."""


@dataclasses.dataclass(frozen=True)
class ExpertProduct:
    """A node of that name; shapes and meaning of its inputs: model/experts.py."""

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
        scheme = plan.experts(module_of(name))
        if scheme is None or source is None or not is_weight(self.weight):
            return None
        count, depth, width = self.sizes
        rows = rows_of_outputs(source, (count * width, depth), is_transposed=self.is_transposed)
        return QuantizedWeight(name, rows, scheme, transposed=True)


def find_expert_products(graph: ir.Graph) -> Iterator[ExpertProduct]:
    """All that are left. The node that is handed out may be replaced."""
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == EXPERT_PRODUCT:
            flags = (bool(node.attributes[name].as_int()) for name in ("is_transposed", "in_place"))
            yield ExpertProduct(node, operand(node, 0), operand(node, 1), optional(node, 2), *flags)


def expand_experts(model: ir.Model) -> None:
    """Every ExpertProduct that is left, in standard operators. A matrix is transposed nowhere, its inputs are."""
    for product in find_expert_products(model.graph):
        b = Builder(model.graph)
        x, weight = _by_expert(b, product), _taken(b, product.weight, product.picks)
        out = b.matmul(x, weight) if product.is_transposed else _transposed(b, b.matmul(weight, _transposed(b, x)))
        replace_node(product.node, b.nodes, [b.reshape(out, known_shape(product.result))])


def quantize_experts(model: ir.Model, plan: Plan) -> None:
    """Round the experts' matrices that the plan says, in the form above."""
    for product in find_expert_products(model.graph):
        weight = product.rounded(plan)
        if weight is not None:
            _write(model.graph, product, weight)


def _write(graph: ir.Graph, product: ExpertProduct, weight: QuantizedWeight) -> None:
    b, result = Builder(graph), product.result
    count, depth, width = product.sizes

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
    matrices, scales = (_taken(b, part, product.picks) for part in (matrices, scales))
    x = b.cast(_by_expert(b, product), FLOAT)
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
    replace_node(product.node, b.nodes, [b.cast(out, result.dtype or FLOAT)])


def _by_expert(b: Builder, product: ExpertProduct) -> ir.Value:
    """The inputs of each matrix: [P, 1, K], or of all experts [1 or E, n, K].

    They are repeated: ONNX Runtime on a GPU copies pointers from the host for a product that is broadcast.
    """
    if product.picks is None:
        return product.x
    (count,), (rows, depth) = known_shape(product.picks), known_shape(product.x)
    x = product.x
    if rows < count:
        shape = (rows, count // rows, depth)
        x = b.op("Expand", [b.reshape(x, (rows, 1, depth)), b.ints(shape, "shape")], shape, x.dtype)
    return b.reshape(x, (count, 1, depth))


def _taken(b: Builder, value: ir.Value, picks: ir.Value | None) -> ir.Value:
    """The rows `picks` of a value's first axis; None: all."""
    if picks is None:
        return value
    return b.op("Gather", [value, picks], (*known_shape(picks), *known_shape(value)[1:]), value.dtype, axis=0)


def _transposed(b: Builder, value: ir.Value) -> ir.Value:
    first, rows, columns = known_shape(value)
    return b.op("Transpose", [value], (first, columns, rows), value.dtype, perm=[0, 2, 1])


def rows_of_outputs(source: ir.TensorProtocol, shape: tuple[int, int], *, is_transposed: bool) -> ir.TensorProtocol:
    """The matrices [E, M, K], or [E, K, M] if `is_transposed`, as the rows of one, [E * M, K], made when it is read."""

    def make() -> ir.Tensor[Any]:
        array = source.numpy().transpose(0, 2, 1) if is_transposed else source.numpy()
        return ir.Tensor(np.ascontiguousarray(array).reshape(shape))

    return ir.LazyTensor(make, dtype=source.dtype, shape=ir.Shape(shape), name=source.name)
