"""The products of a graph by constant matrices: what quantisation replaces."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from sinkexport.graph.edit import is_weight, known_shape
from sinkexport.graph.passes.weights import ROWS

Rows = tuple[tuple[str, ir.TensorProtocol], ...]


@dataclasses.dataclass(frozen=True)
class Product:
    """``x @ W``, x [.., K] and W [K, N]: a MatMul, or a Gemm whose W^T [N, K] is also an embedding table.

    rows: W^T in pieces [n, K] as the model holds them, with their names: those of joined projections, in order.
    """

    node: ir.Node
    x: ir.Value
    weight: ir.Value
    rows: Rows
    is_table: bool

    @property
    def dtype(self) -> ir.DataType:
        """Of x and of the result."""
        if self.x.dtype is None:
            raise ValueError(f"'{self.x.name}' has no type")
        return self.x.dtype

    @property
    def depth(self) -> int:
        """K."""
        return known_shape(self.x)[-1]

    @property
    def width(self) -> int:
        """N."""
        return known_shape(self.node.outputs[0])[-1]

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
    return weight_name.removesuffix(".T").removesuffix(".weight").removeprefix("model.")


def find_products(graph: ir.Graph) -> Iterator[Product]:
    """Every product by a constant matrix of the model. A matrix that anything else reads, but as a table, is left."""
    for node in graph:
        if node.domain or node.op_type not in ("MatMul", "Gemm") or len(node.inputs) != 2:
            continue
        x, weight = node.inputs
        if x is None or weight is None or not is_weight(weight):
            continue
        if node.op_type == "MatMul" and ROWS in weight.meta and len(weight.uses()) == 1:
            yield Product(node, x, weight, weight.meta[ROWS], False)
        elif node.op_type == "Gemm" and _is_table(node, weight) and weight.const_value is not None:
            yield Product(node, x, weight, ((str(weight.name), weight.const_value),), True)


def find_tables(graph: ir.Graph) -> Iterator[ir.Node]:
    """Every Gather of rows of a constant matrix of floating-point numbers, by run-time indices: embeddings."""
    for node in graph:
        if node.domain or node.op_type != "Gather" or not is_weight(node.inputs[0]) or is_weight(node.inputs[1]):
            continue
        table = node.inputs[0]
        if table is None or table.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            continue
        if len(known_shape(table)) == 2:
            yield node


def _is_table(node: ir.Node, weight: ir.Value) -> bool:
    others = [use.node for use in weight.uses() if use.node is not node]
    return "transB" in node.attributes and all(other.op_type == "Gather" for other in others)
