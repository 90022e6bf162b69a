"""SinkAttention over one token a stream and an INT8 window: the window is read as the integers that it holds.

Both matmuls with the window are integer matmuls. The *other* operand, small and new in each step, is rounded to fit:
the query, and the softmax weights with the values' scales multiplied in. Each is cut into three parts of 7 bits.
Together they lose no more than float32 does over the sum: a step gives what a chunk gives. (Two parts would lose a
fortieth of what the window's own rounding costs, and one as much.) The keys' scales are multiplied into the logits.
No tensor of the window's size is ever scaled, or made in floating point.

Why not simply cast the window to float32: that writes and reads four bytes an entry again. As a chain of 30 layers of
3 key heads of 64 and W = 1020, with two threads of an AMD EPYC with AVX512-VNNI, in ms (tenth percentile of 200 steps):

    window in float32                                              2.0
    integer matmuls, two parts | three parts                       4.4 | 5.0
    keys cast to float32, values by integers in two | three parts  5.3 | 5.6
    keys and values cast to float32                                7.9
    (by DequantizeLinear instead of Cast, in another run: 11.5 where Cast takes 7.1)

Turning the keys is a fifth of it: a window of keys that were stored turned, [D, W], would need none.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sinkexport.graph.attention.int8_rows import as_float, cast, new_int8_rows
from sinkexport.graph.attention.step import StepAttention
from sinkexport.graph.edit import constant, known_shape, operand

PART_MAX = 63
ZERO_POINT = PART_MAX + 1
"""Parts are unsigned, 1 .. 127: processors without VNNI add two products uint8 * int8 in 16 bits, which saturates above
(127 * 127 * 2 < 2^15), and ONNX Runtime's matmuls with a signed left operand are four times slower."""
FINER = 2 * PART_MAX
"""Steps of a part in one of the part before it, whose remainder is at most half a step either way."""
NUM_PARTS = 3
"""63 * 126 * 126 steps of a row's largest entry: 2^-21 of it is lost, which float32 loses over a sum as well."""


class Int8StepAttention(StepAttention):
    """Expands one node with T = 1 and an int8 window. The window's states are window_k, window_v and their scales."""

    def _write_window(self) -> list[ir.Value]:
        rows = new_int8_rows(self).by_state()
        states = [self.write_rows(operand(self.node, i), new, self._slot()) for i, new in rows]
        return self.as_keys_and_values(states)

    def _window_logits(self, q: ir.Value, window: list[ir.Value]) -> ir.Value:
        b = self.b
        scales = [self._scales(scale) for scale in window[2 : None if self.latent_dim else 3]]
        batch, num_heads, window_size, head_dim = known_shape(window[0])
        # As the right operand keys must be turned, one byte an entry; as the left one they would be the signed one.
        turned = b.op("Transpose", [window[0]], (batch, num_heads, head_dim, window_size), perm=(0, 1, 3, 2))
        query = as_float(b, b.reshape(q, (batch, num_heads, self.group, head_dim)))
        parts = [(query, turned, scales[0])]
        if self.latent_dim:  # each part of a row has its scale
            queries, keys = b.split(query, self.row_parts, 3), b.split(turned, self.row_parts, 2)
            parts = list(zip(queries, keys, scales, strict=True))
        found = [b.op("Mul", [self._integer_matmul(x, b.op("Abs", [x]), keys), scale]) for x, keys, scale in parts]
        logits = found[0] if len(found) == 1 else b.op("Add", found)
        return b.reshape(cast(b, logits, self.q.dtype), (*self._grouped, window_size, 1))

    def _window_sum(self, weights: ir.Value, window: list[ir.Value]) -> ir.Value:
        b = self.b
        values, scale = window[1], self._scales(window[3])
        heads = (self.batch, self.num_kv_heads, self.group, self.window_size)
        weights = b.op("Mul", [as_float(b, b.reshape(weights, heads)), scale])  # >= 0, as softmax gives them
        out = self._integer_matmul(weights, b.op("Abs", [weights]) if self.has_affine else weights, values)
        return b.reshape(cast(b, out, self.q.dtype), (*self._grouped, 1, self.value_dim))

    def _scales(self, state: ir.Value) -> ir.Value:
        """float16 [B, Hkv, W] -> float32 [B, Hkv, 1, W]."""
        return self.b.reshape(as_float(self.b, state), (self.batch, self.num_kv_heads, 1, self.window_size))

    def _integer_matmul(self, x: ir.Value, magnitude: ir.Value, integers: ir.Value) -> ir.Value:
        """x float32 [B, Hkv, G, n], |x| the magnitude, times int8 [B, Hkv, n, m] -> float32 [B, Hkv, G, m]."""
        b, float_ = self.b, ir.DataType.FLOAT
        batch, num_heads, group, length = known_shape(x)
        peak = b.op("ReduceMax", [magnitude, b.ints([-1], "axes")], (batch, num_heads, group, 1), keepdims=1)
        # A row of zeros is divided by something; it stays zero.
        step = b.op("Max", [b.op("Mul", [peak, b.scalar(1.0 / PART_MAX, float_)]), b.scalar(1e-30, float_)])
        rest, parts = b.op("Div", [x, step]), []
        for _ in range(NUM_PARTS - 1):
            parts.append(rest)
            rest = b.op("Mul", [b.op("Sub", [rest, b.op("Round", [rest])]), b.scalar(FINER, float_)])
        rows = NUM_PARTS * group
        joined = b.op("Concat", [*parts, rest], (batch, num_heads, rows, length), axis=2)
        zero_point = constant(b.graph, np.array(ZERO_POINT, dtype=np.uint8), "zero_point")
        integer = b.op(
            "QuantizeLinear", [joined, b.scalar(1.0, float_), zero_point], known_shape(joined), ir.DataType.UINT8
        )
        sums = b.op(
            "MatMulInteger",
            [integer, integers, zero_point],
            (batch, num_heads, rows, known_shape(integers)[-1]),
            ir.DataType.INT32,
        )
        # The parts of a row are put together, and scaled, by one small matmul: [G, parts * G] @ [parts * G, m].
        together = np.concatenate([np.eye(group, dtype=np.float32) / FINER**i for i in range(NUM_PARTS)], axis=1)
        steps = b.op("Mul", [step, constant(b.graph, together, "parts")])
        return b.matmul(steps, as_float(b, sums))
