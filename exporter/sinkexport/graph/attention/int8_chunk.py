"""SinkAttention over a chunk of tokens and an INT8 window: every token sees the rounded rows, as in single steps.

Rows that the chunk evicts are taken out as integers with their scales. The chunk's own are rounded before anything
reads them. A token that does not count writes back the integers that it found. So no row is rounded twice. Unlike a
step, a chunk is bound by arithmetic and has more logits than the window has entries. So the window is brought to
floating point once, scales included, and the matmuls are those of chunk.py.
"""

from __future__ import annotations

import onnx_ir as ir

from sinkexport.graph.attention.chunk import ChunkAttention, Written
from sinkexport.graph.attention.int8_rows import as_float, cast, quantized_rows
from sinkexport.graph.edit import known_shape, operand


class Int8ChunkAttention(ChunkAttention):
    """Expands one node with T > 1 and an int8 window. The window's states are window_k, window_v and their scales."""

    def _write_window(self) -> Written:
        rows = quantized_rows(self.b, self.k, None if self.is_latent else self.v)
        pairs = [self._exchange(operand(self.node, i), new) for i, new in rows.by_state()]
        states, evicted = ([pair[i] for pair in pairs] for i in range(2))
        half = len(states) // 2
        window, removed = (
            self.as_keys_and_values([self._floats(*x) for x in zip(y[:half], y[half:], strict=True)])
            for y in (states, evicted)
        )
        return self.as_keys_and_values(states), window, removed

    def _floats(self, entries: ir.Value, scale: ir.Value) -> ir.Value:
        """int8 [B, Hkv, n, D] and float16 [B, Hkv, n] -> [B, Hkv, n, D] of the bundle's dtype."""
        b = self.b
        factor = b.reshape(as_float(b, scale), (*known_shape(scale), 1))
        return cast(b, b.op("Mul", [as_float(b, entries), factor]), self.q.dtype)
