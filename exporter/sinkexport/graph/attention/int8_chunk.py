"""SinkAttention over a chunk of tokens and an INT8 window: every token sees the rounded rows, as in single steps.

Rows that the chunk evicts are taken out as integers with their scales. The chunk's own are rounded before anything
reads them. A token that does not count writes back the integers that it found. So no row is rounded twice. Unlike a
step, a chunk is bound by arithmetic and has more logits than the window has entries. So the window is brought to
floating point once, scales included, and the matmuls are those of chunk.py.
"""

from __future__ import annotations

import onnx_ir as ir

from sinkexport.graph.attention.chunk import ChunkAttention, Written
from sinkexport.graph.attention.int8_rows import as_float, cast, new_int8_rows
from sinkexport.graph.edit import known_shape, operand


class Int8ChunkAttention(ChunkAttention):
    """Expands one node with T > 1 and an int8 window. The window's states are window_k, window_v and their scales."""

    def _write_window(self) -> Written:
        pairs = [self._exchange(operand(self.node, i), new) for i, new in new_int8_rows(self).by_state()]
        states, evicted = ([pair[i] for pair in pairs] for i in range(2))
        window, removed = (self._keys_and_values(rows) for rows in (states, evicted))
        return self.as_keys_and_values(states), window, removed

    def _keys_and_values(self, rows: list[ir.Value]) -> list[ir.Value]:
        """Rows of one or two states and two scales -> keys and values in floating point."""
        if not self.latent_dim:
            return [self._floats(*x) for x in zip(rows[:2], rows[2:], strict=True)]
        entries, *scales = rows
        parts = zip(self.b.split(entries, self.row_parts, -1), scales, strict=True)
        row = self.b.op("Concat", [self._floats(*x) for x in parts], known_shape(entries), self.q.dtype, axis=-1)
        return self.as_keys_and_values([row])

    def _floats(self, entries: ir.Value, scale: ir.Value) -> ir.Value:
        """int8 [B, Hkv, n, D] and float16 [B, Hkv, n] -> [B, Hkv, n, D] of the bundle's dtype."""
        b = self.b
        factor = b.reshape(as_float(b, scale), (*known_shape(scale), 1))
        return cast(b, b.op("Mul", [as_float(b, entries), factor]), self.q.dtype)
