"""Rows of the INT8 window in standard ONNX operators; model/int8_rows.py defines them and says why."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape
from sinkexport.graph.operators import Input
from sinkexport.model.int8_rows import INT8_MAX, LARGEST_SCALE, SMALLEST_SCALE


@dataclasses.dataclass(frozen=True)
class Int8Rows:
    """Keys and values of T tokens: k, v int8 [B, Hkv, T, D]; k_scale, v_scale float16 [B, Hkv, T]."""

    k: ir.Value
    v: ir.Value
    k_scale: ir.Value
    v_scale: ir.Value

    def by_state(self) -> tuple[tuple[Input, ir.Value], ...]:
        """Each with the state that it is written to, keys and values first."""
        return (
            (Input.WINDOW_K, self.k),
            (Input.WINDOW_V, self.v),
            (Input.WINDOW_K_SCALE, self.k_scale),
            (Input.WINDOW_V_SCALE, self.v_scale),
        )


def quantized_rows(b: Builder, k: ir.Value, v: ir.Value) -> Int8Rows:
    """k, v [B, Hkv, T, D] in floating point, rounded together: half the nodes, which is what a step is short of."""
    batch, num_heads, num_tokens, head_dim = known_shape(k)
    rows, both = (batch, 2 * num_heads, num_tokens, head_dim), [num_heads, num_heads]
    x = as_float(b, b.op("Concat", [k, v], rows, axis=1))
    peak = b.op("ReduceMax", [b.op("Abs", [x]), b.ints([-1], "axes")], (*rows[:-1], 1), keepdims=1)
    scale = b.op("Div", [peak, b.scalar(INT8_MAX, x.dtype)])
    scale = b.op("Clip", [scale, b.scalar(SMALLEST_SCALE, x.dtype), b.scalar(LARGEST_SCALE, x.dtype)])
    stored = cast(b, scale, ir.DataType.FLOAT16)
    entries = b.op("Round", [b.op("Div", [x, as_float(b, stored)])])  # halves to even
    entries = b.op("Clip", [entries, b.scalar(-INT8_MAX, x.dtype), b.scalar(INT8_MAX, x.dtype)])
    k8, v8 = b.split(cast(b, entries, ir.DataType.INT8), both, 1)
    k_scale, v_scale = b.split(b.reshape(stored, rows[:-1]), both, 1)
    return Int8Rows(k8, v8, k_scale, v_scale)


def cast(b: Builder, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """`value` itself if it has this type already."""
    if dtype is None or value.dtype == dtype:
        return value
    return b.op("Cast", [value], known_shape(value), dtype, to=int(dtype))


def as_float(b: Builder, value: ir.Value) -> ir.Value:
    """`value` in float32: scales, and all arithmetic with INT8 entries, whatever the bundle's dtype."""
    return cast(b, value, ir.DataType.FLOAT)
