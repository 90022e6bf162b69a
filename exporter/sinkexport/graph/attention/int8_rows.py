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
    """Keys and values of T tokens: k, v int8 [B, Hkv, T, D]; k_scale, v_scale float16 [B, Hkv, T].

    None: keys' rows are the values.
    """

    k: ir.Value
    v: ir.Value | None
    k_scale: ir.Value
    v_scale: ir.Value | None

    def by_state(self) -> tuple[tuple[Input, ir.Value], ...]:
        """Each with the state that it is written to, keys and values first."""
        rows = (
            (Input.WINDOW_K, self.k),
            (Input.WINDOW_V, self.v),
            (Input.WINDOW_K_SCALE, self.k_scale),
            (Input.WINDOW_V_SCALE, self.v_scale),
        )
        return tuple((i, row) for i, row in rows if row is not None)


def quantized_rows(b: Builder, k: ir.Value, v: ir.Value | None) -> Int8Rows:
    """k, v [B, Hkv, T, D or Dv] in floating point; v: None where rows of keys are the values.

    Rows of one size are rounded together: half the nodes, which is what a step is short of.
    """
    batch, num_heads, num_tokens, head_dim = known_shape(k)
    if v is None:
        k8, k_scale = _rounded(b, k)
        return Int8Rows(k8, None, b.reshape(k_scale, known_shape(k_scale)[:-1]), None)
    if known_shape(v)[3] != head_dim:
        (k8, k_scale), (v8, v_scale) = _rounded(b, k), _rounded(b, v)
        return Int8Rows(k8, v8, *(b.reshape(x, known_shape(x)[:-1]) for x in (k_scale, v_scale)))
    both, shape = [num_heads, num_heads], (batch, 2 * num_heads, num_tokens)
    entries, scales = _rounded(b, b.op("Concat", [k, v], (*shape, head_dim), axis=1))
    return Int8Rows(*b.split(entries, both, 1), *b.split(b.reshape(scales, shape), both, 1))


def _rounded(b: Builder, rows: ir.Value) -> tuple[ir.Value, ir.Value]:
    """[B, H, T, D] in floating point -> int8 of the same shape, and float16 scales [B, H, T, 1]."""
    x = as_float(b, rows)
    peak = b.op("ReduceMax", [b.op("Abs", [x]), b.ints([-1], "axes")], (*known_shape(x)[:-1], 1), keepdims=1)
    scale = b.op("Div", [peak, b.scalar(INT8_MAX, x.dtype)])
    scale = b.op("Clip", [scale, b.scalar(SMALLEST_SCALE, x.dtype), b.scalar(LARGEST_SCALE, x.dtype)])
    stored = cast(b, scale, ir.DataType.FLOAT16)
    entries = b.op("Round", [b.op("Div", [x, as_float(b, stored)])])  # halves to even
    entries = b.op("Clip", [entries, b.scalar(-INT8_MAX, x.dtype), b.scalar(INT8_MAX, x.dtype)])
    return cast(b, entries, ir.DataType.INT8), stored


def cast(b: Builder, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """`value` itself if it has this type already."""
    if dtype is None or value.dtype == dtype:
        return value
    return b.op("Cast", [value], known_shape(value), dtype, to=int(dtype))


def as_float(b: Builder, value: ir.Value) -> ir.Value:
    """`value` in float32: scales, and all arithmetic with INT8 entries, whatever the bundle's dtype."""
    return cast(b, value, ir.DataType.FLOAT)
