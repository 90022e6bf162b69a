"""The matmuls of a graph by constant matrices: what quantisation replaces, and the biases that follow them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from sinkexport.graph.edit import is_weight, known_shape, only_user, operand
from sinkexport.util.traced_names import MODEL

ROWS = "rows"
"""Key in the metadata of a weight [K, N] of a matmul: the tensors [n, K] whose transpose it is, in order, as pairs
(name, tensor). A matrix without it is not the model's own, and no pass touches it."""

QUANTIZED = "quantized"
"""Key in the metadata of integers and scales that stand for a weight: they are not quantised again."""

Rows = tuple[tuple[str, ir.TensorProtocol], ...]


@dataclasses.dataclass(frozen=True)
class Matmul:
    """``x @ W``, x [.., K] and W [K, N]: a MatMul, or a Gemm whose W^T [N, K] is also an embedding table.

    rows: W^T in pieces [n, K] as the model holds them, with their names: those of joined projections, in order.
    """

    node: ir.Node
    weight: ir.Value
    rows: Rows
    is_table: bool

    @property
    def x(self) -> ir.Value:
        """The input, as it is now: it may be the result of another matmul, which a pass has replaced."""
        return operand(self.node, 0)

    @property
    def dtype(self) -> ir.DataType:
        """Type of x and of the result."""
        if self.x.dtype is None:
            raise ValueError(f"'{self.x.name}' has no type")
        return self.x.dtype

    @property
    def depth(self) -> int:
        """K, read off the weight: also right once the node has been replaced."""
        return known_shape(self.weight)[-1 if self.is_table else 0]

    @property
    def width(self) -> int:
        """N."""
        return known_shape(self.weight)[0 if self.is_table else -1]

    @property
    def num_rows(self) -> int:
        """Tokens that x holds."""
        return int(np.prod(known_shape(self.x)[:-1]))

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules whose weights these are, such as ``model.layers.0.self_attn.q_proj``."""
        return tuple(module_of(name) for name, _ in self.rows)

    @functools.cached_property
    def transposed(self) -> ir.TensorProtocol:
        """W^T [N, K], read when it is written."""
        (_, first), *others = self.rows
        if not others:
            return first
        return ir.LazyTensor(
            lambda: ir.Tensor(np.concatenate([tensor.numpy() for _, tensor in self.rows])),
            dtype=first.dtype,
            shape=ir.Shape((self.width, self.depth)),
            name=str(self.weight.name),
        )


def module_of(weight_name: str) -> str:
    """The module of a parameter of the traced step, whose only child is the model, ``model``."""
    return weight_name.removesuffix(".T").removesuffix(".weight").removeprefix(MODEL)


def find_matmuls(graph: ir.Graph) -> Iterator[Matmul]:
    """Every matmul by a constant matrix of the model, unless something else than an embedding reads the matrix."""
    for node in graph:
        if node.domain or node.op_type not in ("MatMul", "Gemm") or len(node.inputs) != 2:
            continue
        x, weight = node.inputs
        if x is None or weight is None or not is_weight(weight):
            continue
        if node.op_type == "MatMul" and ROWS in weight.meta and len(weight.uses()) == 1:
            yield Matmul(node, weight, weight.meta[ROWS], False)
        elif node.op_type == "Gemm" and _is_table(node, weight) and weight.const_value is not None:
            yield Matmul(node, weight, ((str(weight.name), weight.const_value),), True)


def find_tables(graph: ir.Graph) -> Iterator[ir.Node]:
    """Embeddings: every Gather of rows of a constant floating-point matrix by run-time indices."""
    for node in graph:
        if node.domain or node.op_type != "Gather" or not is_weight(node.inputs[0]) or is_weight(node.inputs[1]):
            continue
        table = node.inputs[0]
        if table is None or table.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16) or QUANTIZED in table.meta:
            continue
        if len(known_shape(table)) == 2:
            yield node


def bias_addition(result: ir.Value) -> ir.Node | None:
    """The Add of a 1-D weight that is the only reader of `result`, a matmul's."""
    addition = only_user(result, "Add")
    other = weight_operand(addition)
    return addition if other is not None and known_shape(other) == known_shape(result)[-1:] else None


def weight_operand(node: ir.Node | None) -> ir.Value | None:
    """The first input that is a constant; None: none is, or there is no node."""
    return next((value for value in node.inputs if is_weight(value)), None) if node is not None else None


def _is_table(node: ir.Node, weight: ir.Value) -> bool:
    others = [use.node for use in weight.uses() if use.node is not node]
    return "transB" in node.attributes and all(other.op_type == "Gather" for other in others)
