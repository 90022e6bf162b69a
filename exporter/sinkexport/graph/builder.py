"""Write standard ONNX nodes as expressions, with shapes kept static as they are made."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sinkexport.graph.edit import constant, known_shape, typed

COMPARISONS = frozenset(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"))

LARGE_CONSTANT_BYTES = 2**20
"""Constants of a prefill graph that are larger must be weights, which it shares: tables of positions are computed."""


class Builder:
    """Collects nodes in order; the caller inserts them.

    Element-wise results take the broadcast shape of their inputs and the type of the first; comparisons are bool.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = []

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        shape: Sequence[int] | None = None,
        dtype: ir.DataType | None = None,
        domain: str = "",
        **attributes: int | float | str | Sequence[int],
    ) -> ir.Value:
        """Add one node with one output."""
        node = ir.node(op_type, list(inputs), attributes, domain=domain)
        self.nodes.append(node)
        if shape is None:
            shape = np.broadcast_shapes(*(known_shape(value) for value in inputs))
        if dtype is None:
            dtype = ir.DataType.BOOL if op_type in COMPARISONS else inputs[0].dtype
        return typed(node.outputs[0], shape, dtype)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` in another type; itself if it has that one."""
        return value if value.dtype == dtype else self.op("Cast", [value], known_shape(value), dtype, to=int(dtype))

    def split(self, value: ir.Value, sizes: Sequence[int], axis: int) -> list[ir.Value]:
        """Cut `value` along `axis` into pieces of `sizes`."""
        node = ir.node("Split", [value, self.ints(sizes, "split")], {"axis": axis}, num_outputs=len(sizes))
        self.nodes.append(node)
        shape = list(known_shape(value))
        for output, size in zip(node.outputs, sizes, strict=True):
            shape[axis] = size
            typed(output, shape, value.dtype)
        return list(node.outputs)

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """`value` itself if it has this shape already."""
        if known_shape(value) == tuple(shape):
            return value
        return self.op("Reshape", [value, self.ints(shape, "shape")], shape)

    def matmul(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """a [..., M, K] @ b [..., K, N], leading axes broadcast."""
        left, right = known_shape(a), known_shape(b)
        leading = np.broadcast_shapes(left[:-2], right[:-2])
        return self.op("MatMul", [a, b], (*leading, left[-2], right[-1]))

    def ints(self, values: Sequence[int] | int | np.ndarray, hint: str) -> ir.Value:
        """An int64 constant."""
        return constant(self.graph, np.asarray(values, dtype=np.int64), hint)

    def range(self, first: int, shape: Sequence[int], hint: str) -> ir.Value:
        """int64 first, first + 1 .. in a shape: a constant, or computed in the graph if it would be a large one."""
        count = math.prod(shape)
        if count * 8 <= LARGE_CONSTANT_BYTES:
            return self.ints(np.arange(first, first + count).reshape(shape), hint)
        ends = [self.ints(end, hint) for end in (first, first + count, 1)]
        return self.reshape(self.op("Range", ends, (count,)), shape)

    def bools(self, values: np.ndarray, hint: str) -> ir.Value:
        """A constant of truth values."""
        return constant(self.graph, values, hint)

    def scalar(self, value: float, dtype: ir.DataType | None) -> ir.Value:
        """A floating-point constant of shape []."""
        return constant(self.graph, np.asarray(value, dtype=(dtype or ir.DataType.FLOAT).numpy()), "scalar")
