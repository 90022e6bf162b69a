"""SinkAttention over T drafted tokens a stream that writes no state: each token as if those before it had been fed.

A draft may be rejected, so the rows that it would evict must stay. Attention reads three parts: sinks and window as
they are, and the draft itself, each entry masked by the distance that DESIGN's definition gives it. What a chunk would
write comes out instead, and is written later as far as it is accepted (`sinkrt.speculate.rows`).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sinkexport.graph.attention.chunk_parts import ChunkParts
from sinkexport.graph.attention.int8_rows import as_float, cast, new_int8_rows
from sinkexport.graph.attention.parts import FLOAT
from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import constant, known_shape, operand
from sinkexport.graph.operators import Input

Rows = tuple[list[ir.Value], list[ir.Value], list[ir.Value]]
"""New rows for the sinks and for the window's states, as they are stored, and keys and values as tokens see them."""


class VerifyAttention(ChunkParts):
    """Expands one node. t: position of a token; p: position of the first. No token sees a later one, so how many count
    makes no difference here."""

    def expand(self) -> None:
        if self.mass is not None:
            raise ValueError(f"'{self.node.name}': attention_mass is written by every token; drafts cannot be verified")
        sinks, states, seen = self.written(self._new_rows)
        q = self.scaled(self.q)
        parts = [(q, *self._window()), (q, *seen)]
        if self.num_sinks:
            # A sink inside the draft is at its true distance: t <= S + W - 2 = C - 2, as in a chunk.
            parts.insert(0, (self.turned_back(q), *self._old_sinks()))
        weights = self.with_affine(self.weights_of(parts), self._share)
        self.replace_node(self.output_of(weights, parts), sinks, states)

    def _scaled(self, logits: list[ir.Value]) -> list[ir.Value]:
        logits = super()._scaled(logits)
        return [*logits[:-1], self.b.op("Add", [logits[-1], self._scale_of_token_0()])]

    def _new_rows(self) -> Rows:
        new = self.as_keys_and_values([self.k] if self.latent_dim else [self.k, self.v])
        return (new if self.num_sinks else []), new, new

    def _window(self) -> list[ir.Value]:
        """Keys and values of the window in floating point."""
        kinds = (Input.WINDOW_K,) if self.latent_dim else (Input.WINDOW_K, Input.WINDOW_V)
        return self.as_keys_and_values([operand(self.node, i) for i in kinds])

    def _old_sinks(self) -> list[ir.Value]:
        kinds = (Input.SINK_K,) if self.latent_dim else (Input.SINK_K, Input.SINK_V)
        return self.as_keys_and_values([operand(self.node, i) for i in kinds])

    def _scale_of_token_0(self) -> ir.Value:
        """[B, Hkv, G, 1, T]: the logarithm of `sink_scale` where a token of the draft is the stream's first."""
        scale, dtype = self.sink_scale, self.q.dtype or ir.DataType.FLOAT
        if scale is None or scale.const_value is None:
            raise ValueError(f"'{self.node.name}': sink_scale must be constant")
        shape = (1, self.num_kv_heads, self.group, 1, 1)
        factors = np.log(scale.const_value.numpy().astype(np.float64)).reshape(shape).astype(dtype.numpy())

        def build(b: Builder) -> ir.Value:
            t = b.op("Add", [self._column(b, self.position, 5), b.ints(np.arange(self.num_tokens), "tokens")])
            return b.op("Equal", [t, b.ints(0, "zero")])  # [B, 1, 1, 1, T]

        b, is_first = self.b, self.once("is token 0", build)
        scales = constant(b.graph, factors, "scale_of_token_0")
        full = (self.batch, self.num_kv_heads, self.group, 1, self.num_tokens)
        return b.op("Where", [is_first, scales, b.scalar(0.0, dtype)], full, dtype)

    # --- what positions decide: the window has no token of the draft yet ---

    def _sees_sinks(self, b: Builder) -> ir.Value:
        """bool [B, T, S]: j < p."""
        sinks = b.ints(np.arange(self.num_sinks).reshape(1, 1, -1), "sinks")
        there = b.op("Less", [sinks, self._column(b, self.position, 3)])  # [B, 1, S]
        shape = (self.batch, self.num_tokens, self.num_sinks)
        return b.op("Expand", [there, b.ints(shape, "shape")], shape)

    def _sees_window(self, b: Builder) -> ir.Value:
        """bool [B, T, W]: the token u in a slot is no sink, and has not left the window: u >= S, t - u < W."""
        token = self._window_tokens(b)
        is_no_sink = b.op("GreaterOrEqual", [token, b.ints(self.num_sinks, "num_sinks")])
        age = b.op("Sub", [self._positions(b), token])
        return b.op("And", [is_no_sink, b.op("Less", [age, b.ints(self.window_size, "window_size")])])

    def _last(self, b: Builder) -> ir.Value:
        """int64 [B]: p - 1, the last token in the cache. Slots of a stream that begins hold none: u < 0."""
        return b.op("Sub", [self.position, b.ints(1, "one")])

    def _sees_evicted(self, b: Builder) -> ir.Value:
        """bool [B, T, T]: token i of the draft sees token m if m <= i. T <= W: none is too old."""
        tokens = np.arange(self.num_tokens)
        seen = b.bools(tokens[:, None] >= tokens[None, :], "not_later")
        shape = (self.batch, self.num_tokens, self.num_tokens)
        return b.op("Expand", [b.reshape(seen, (1, *shape[1:])), b.ints(shape, "shape")], shape)

    def _distances_in_window(self, b: Builder, t: ir.Value) -> list[ir.Value]:
        """Those of slots [B, T, W] and of the draft's tokens [B, T, T]."""
        tokens = np.arange(self.num_tokens)
        between = np.broadcast_to(tokens[:, None] - tokens[None, :], (self.batch, self.num_tokens, self.num_tokens))
        return [b.op("Sub", [t, self._window_tokens(b)]), b.ints(between, "tokens_between")]


class Int8VerifyAttention(VerifyAttention):
    """Expands one node with an int8 window. A token's scale is its own; sinks are not rounded, in the draft neither."""

    def _new_rows(self) -> Rows:
        plain = [self.k] if self.latent_dim else [self.k, self.v]
        stored = [row for _, row in new_int8_rows(self).by_state()]
        seen = self._floats(stored)
        if self.num_sinks:
            pairs = zip(plain, seen, strict=True)
            is_sink = self._is_sink()
            seen = [self.b.op("Where", [is_sink, raw, rounded], known_shape(raw), raw.dtype) for raw, rounded in pairs]
        sinks = self.as_keys_and_values(plain) if self.num_sinks else []
        return sinks, self.as_keys_and_values(stored), self.as_keys_and_values(seen)

    def _window(self) -> list[ir.Value]:
        kinds = [Input.WINDOW_K] if self.latent_dim else [Input.WINDOW_K, Input.WINDOW_V]
        kinds += [Input.WINDOW_K_SCALE, Input.WINDOW_V_SCALE]
        return self.as_keys_and_values(self._floats([operand(self.node, i) for i in kinds]))

    def _is_sink(self) -> ir.Value:
        """bool [B, 1, T, 1]: t < S."""

        def build(b: Builder) -> ir.Value:
            tokens = b.ints(np.arange(self.num_tokens).reshape(1, 1, -1, 1), "tokens")
            t = b.op("Add", [self._column(b, self.position, 4), tokens])
            return b.op("Less", [t, b.ints(self.num_sinks, "num_sinks")])

        return self.once("is sink", build)

    def _floats(self, rows: list[ir.Value]) -> list[ir.Value]:
        """Rows of one or two states and two scales -> one row of keys, or keys and values, in the bundle's dtype."""
        b, factors = self.b, []
        for scale in rows[-2:]:
            factors.append(b.reshape(as_float(b, scale), (*known_shape(scale), 1)))
        entries = b.split(rows[0], self.row_parts, -1) if self.latent_dim else rows[:2]
        products = [b.op("Mul", [as_float(b, x), factor]) for x, factor in zip(entries, factors, strict=True)]
        floats = [cast(b, x, self.q.dtype) for x in products]
        if not self.latent_dim:
            return floats
        return [b.op("Concat", floats, known_shape(rows[0]), self.q.dtype or FLOAT, axis=-1)]
