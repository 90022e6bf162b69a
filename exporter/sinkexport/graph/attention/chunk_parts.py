"""Attention of T tokens over several parts of keys and values, whatever those are."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from sinkexport.graph.attention.chunk_positions import ChunkPositions
from sinkexport.graph.edit import known_shape

Part = tuple[ir.Value, ...]
"""Three: queries [B, Hq, T, D], and the keys [B, Hkv, n, D] and values [B, Hkv, n, Dv] that they see."""


class ChunkParts(ChunkPositions):
    """One node with T > 1 whose tokens see some parts, the sinks first."""

    def weights_of(self, parts: Sequence[Part]) -> ir.Value:
        """Softmax over the entries of all parts: [B, Hkv, G, T, sum of n]."""
        b, rows = self.b, self.group * self.num_tokens
        heads = (self.batch, self.num_kv_heads)
        lengths = [known_shape(keys)[2] for _, keys, _ in parts]
        entries = sum(lengths)
        logits = [
            b.matmul(b.reshape(query, (*heads, rows, self.head_dim)), self.transposed(keys)) for query, keys, _ in parts
        ]  # [B, Hkv, G*T, n] each
        grouped = (*heads, self.group, self.num_tokens)
        if self.has_sink_scale:
            shaped = [b.reshape(part, (*grouped, length)) for part, length in zip(logits, lengths, strict=True)]
            logits = self._scaled(shaped)
        joined = b.op("Concat", logits, (*known_shape(logits[0])[:-1], entries), axis=-1)
        joined = b.reshape(joined, (*grouped, entries))
        joined = joined if self.has_sink_scale else self.softcapped(joined)
        return self.normalised(b.op("Add", [joined, self._mask()]))

    def output_of(self, weights: ir.Value, parts: Sequence[Part]) -> ir.Value:
        """[B, Hq, T, Dv]: the values of all parts by their weights.

        The values are joined: they are fewer than the weights, which would have to be cut up otherwise.
        """
        b, heads, entries = self.b, (self.batch, self.num_kv_heads), known_shape(weights)[-1]
        values = b.op("Concat", [part[2] for part in parts], (*heads, entries, self.value_dim), axis=-2)
        out = b.matmul(b.reshape(weights, (*heads, self.group * self.num_tokens, entries)), values)
        return b.reshape(out, (self.batch, self.num_q_heads, self.num_tokens, self.value_dim))

    def _scaled(self, logits: list[ir.Value]) -> list[ir.Value]:
        """Logits [B, Hkv, G, T, n] of each part, with `sink_scale`."""
        return self.with_sink_scale(logits, (1, self.num_kv_heads, self.group, 1, self.num_sinks))
