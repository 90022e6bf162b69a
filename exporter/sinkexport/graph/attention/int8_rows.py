"""Rows of the INT8 window in standard ONNX operators; model/int8_rows.py defines them and says why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from sinkexport.graph.attention.parts import AttentionParts
from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape
from sinkexport.graph.operators import Input
from sinkexport.model.int8_rows import INT8_MAX, LARGEST_SCALE, SMALLEST_SCALE


@dataclasses.dataclass(frozen=True)
class Int8Rows:
    """Keys and values of T tokens: k, v int8 [B, Hkv, T, D]; k_scale, v_scale float16 [B, Hkv, T].

    v: None of a latent cache. k_scale is then that of the elements that turn, v_scale that of the others.
    """

    k: ir.Value
    v: ir.Value | None
    k_scale: ir.Value
    v_scale: ir.Value

    def by_state(self) -> tuple[tuple[Input, ir.Value], ...]:
        """Each with the state that it is written to, keys and values first."""
        rows = (
            (Input.WINDOW_K, self.k),
            (Input.WINDOW_V, self.v),
            (Input.WINDOW_K_SCALE, self.k_scale),
            (Input.WINDOW_V_SCALE, self.v_scale),
        )
        return tuple((i, row) for i, row in rows if row is not None)


def new_int8_rows(node: AttentionParts) -> Int8Rows:
    """Keys and values that come with these tokens."""
    if node.latent_dim:
        return latent_rows(node.b, node.k, node.row_parts)
    return quantized_rows(node.b, node.k, node.v)


def latent_rows(b: Builder, row: ir.Value, parts: Sequence[int]) -> Int8Rows:
    """row [B, 1, T, R + L] of a latent cache in floating point; parts: R and L.

    Each part has a scale of its own, since nothing keeps them of one size: only the latent has a norm. Error of logits,
    and of results as a share of their spread, for rows of 64 and 512 normal numbers with rotary keys that are larger:

        rotary key    one scale         two
        x 0.25        0.031 | 0.025     0.010 | 0.011
        x 1           0.011 | 0.011     0.010 | 0.010
        x 4           0.025 | 0.029     0.009 | 0.010
        x 16          0.093 | 0.135     0.009 | 0.010
    """
    rounded = [_rounded(b, part) for part in b.split(row, parts, -1)]
    entries = b.op("Concat", [part for part, _ in rounded], known_shape(row), ir.DataType.INT8, axis=-1)
    k_scale, v_scale = (b.reshape(scale, known_shape(scale)[:-1]) for _, scale in rounded)
    return Int8Rows(entries, None, k_scale, v_scale)


def quantized_rows(b: Builder, k: ir.Value, v: ir.Value) -> Int8Rows:
    """k, v [B, Hkv, T, D or Dv] in floating point.

    Rows of one size are rounded together: half the nodes, which is what a step is short of.
    """
    batch, num_heads, num_tokens, head_dim = known_shape(k)
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
