"""What the forms of quantised matmuls have in common."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from sinkexport.graph.attention.parts import PerRun
from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape, lazy_weight
from sinkexport.graph.matmuls import QUANTIZED, Matmul
from sinkexport.graph.quantize.plan import InputScale
from sinkexport.quant.weight import QuantizedWeight


class FormParts:
    """Parts of one graph.

    position: int64 [B] of the first token. num_sinks: first tokens of a stream, which may have scales of their own.
    """

    def __init__(self, graph: ir.Graph, position: ir.Value, num_sinks: int) -> None:
        self.graph = graph
        self.position = position
        self.num_sinks = num_sinks
        self.per_run = PerRun(graph)

    def lazy(
        self,
        weight: QuantizedWeight,
        what: str,
        dtype: ir.DataType,
        shape: tuple[int, ...],
        make: Callable[[], np.ndarray],
    ) -> ir.Value:
        """A part of a quantised weight, made once however often it is asked for."""
        part = lazy_weight(self.graph, f"{weight.name}.{what}", dtype, shape, make)
        part.meta[QUANTIZED] = True
        return part

    def is_sink(self, before: ir.Node, rows: tuple[int, ...]) -> ir.Value:
        """bool [*rows, 1]: whether a token of the run, at position + 0 .. T-1 of its stream, is a sink."""
        batch = known_shape(self.position)[0]

        def build(b: Builder) -> ir.Value:
            tokens = b.ints(np.arange(math.prod(rows) // batch).reshape(1, -1), "tokens")
            position = b.op("Add", [b.reshape(self.position, (batch, 1)), tokens])
            is_sink = b.op("Less", [position, b.ints(self.num_sinks, "num_sinks")])
            return b.reshape(is_sink, (*rows, 1))

        return self.per_run.once(("is sink", rows), before, build)

    def sink_factors(self, b: Builder, matmul: Matmul, scale: InputScale) -> tuple[ir.Value, ir.Value]:
        """[.., 1] each: what makes sinks fit the others' range before the matmul, and its inverse, for after it."""
        if scale.sinks is None:
            raise ValueError("the sinks have no scale of their own")
        rows = known_shape(matmul.x)[:-1]
        is_sink, dtype = self.is_sink(matmul.node, rows), ir.DataType.FLOAT
        one = b.scalar(1.0, dtype)
        before, after = (
            b.op("Where", [is_sink, b.scalar(factor, dtype), one], (*rows, 1), dtype)
            for factor in (scale.rest / scale.sinks, scale.sinks / scale.rest)
        )
        return before, after
