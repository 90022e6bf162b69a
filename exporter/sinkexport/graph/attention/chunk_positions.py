"""What a chunk needs of positions alone: slots, masks and distances. All layers of one geometry share each value."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sinkexport.graph.attention.parts import AttentionParts
from sinkexport.graph.builder import LARGE_CONSTANT_BYTES, Builder
from sinkexport.graph.edit import known_shape, operand
from sinkexport.graph.operators import Input


class ChunkPositions(AttentionParts):
    """One node with T > 1. t: position of a token; p: position of the first; n: num_valid."""

    def _column(self, b: Builder, value: ir.Value, rank: int) -> ir.Value:
        """[B] -> [B, 1, ..]."""
        return b.reshape(value, (self.batch, *[1] * (rank - 1)))

    def _num_valid(self) -> ir.Value:
        return operand(self.node, Input.NUM_VALID)

    def _first_slot(self) -> ir.Value:
        """int64 [B]: (p - S) mod W."""

        def build(b: Builder) -> ir.Value:
            after_sinks = b.op("Sub", [self.position, b.ints(self.num_sinks, "num_sinks")])
            return b.op("Mod", [after_sinks, b.ints(self.window_size, "window_size")])

        return self.once("first slot", build)

    def _slots(self) -> ir.Value:
        """int64 [B, Hkv, T]: where the chunk's tokens go, as rows of the flat window.

        A sink's row is masked until it is written again, as in a step.
        """

        def build(b: Builder) -> ir.Value:
            first = self._column(b, self._first_slot(), 3)
            tokens = b.ints(np.arange(self.num_tokens).reshape(1, 1, -1), "tokens")
            slot = b.op("Mod", [b.op("Add", [first, tokens]), b.ints(self.window_size, "window_size")])
            return b.op("Add", [slot, self._row_offsets(b, self.window_size)])

        return self.once("slots", build)

    def _age_of_slot(self) -> ir.Value:
        """int64 [B, 1, W]: (slot - first) mod W, the token of the chunk that goes to each slot if it is < T."""

        def build(b: Builder) -> ir.Value:
            slots = b.range(0, (1, 1, self.window_size), "slots")
            after_first = b.op("Sub", [slots, self._column(b, self._first_slot(), 3)])
            return b.op("Mod", [after_first, b.ints(self.window_size, "window_size")])

        return self.once("age of slot", build)

    def _slots_of_query_heads(self) -> ir.Value:
        """int64 [B, Hq, T]: the chunk's slots, as elements of the flat [B*Hq*W]."""

        def build(b: Builder) -> ir.Value:
            first = self._column(b, self._first_slot(), 3)
            tokens = b.ints(np.arange(self.num_tokens).reshape(1, 1, -1), "tokens")
            slot = b.op("Mod", [b.op("Add", [first, tokens]), b.ints(self.window_size, "window_size")])
            heads = np.arange(self.batch * self.num_q_heads).reshape(self.batch, self.num_q_heads, 1)
            return b.op("Add", [slot, b.ints(heads * self.window_size, "first_elements")])

        return self.once("slots of query heads", build)

    def _is_new(self) -> ir.Value:
        """bool [B, 1, W]: the slots whose token came with this chunk."""

        def build(b: Builder) -> ir.Value:
            return b.op("GreaterOrEqual", [self._window_tokens(b), self._column(b, self.position, 3)])

        return self.once("is new", build)

    def _counts_of_weights(self) -> ir.Value:
        """bool [B, 1, 1, T, 1]: whether a token of the chunk is valid."""
        shape = (self.batch, 1, 1, self.num_tokens, 1)
        return self.once("counts of weights", lambda b: b.reshape(self._counts(4), shape))

    def _fair_share(self) -> ir.Value:
        """float32 [B, 1, 1, T, W + T]."""

        def build(b: Builder) -> ir.Value:
            t = self._positions(b)
            parts = self._distances_in_window(b, t)
            shape = (self.batch, self.num_tokens, self.window_size + self.num_tokens)
            share = self.share(b, t, b.op("Concat", parts, shape, axis=-1))
            return b.reshape(share, (self.batch, 1, 1, *shape[1:]))

        return self.once("fair share", build)

    def _token_of_slot(self) -> ir.Value:
        """int64 [B, Hkv, W]: what goes to each slot, as a row of the flat chunk; any if nothing does."""

        def build(b: Builder) -> ir.Value:
            token = b.op("Min", [self._age_of_slot(), b.ints(self.num_tokens - 1, "last")])
            return b.op("Add", [token, self._row_offsets(b, self.num_tokens)])

        return self.once("token of slot", build)

    def _is_in_chunk(self, rank: int) -> ir.Value:
        """bool [B, 1, W, 1], or [B, 1, W] for a rank of 3: the slots that the chunk writes."""

        def build(b: Builder) -> ir.Value:
            written = b.op("Less", [self._age_of_slot(), b.ints(self.num_tokens, "num_tokens")])
            return b.reshape(written, (*known_shape(written), *[1] * (rank - 3)))

        return self.once(f"in chunk of rank {rank}", build)

    def _sink_sources(self) -> ir.Value:
        """int64 [B, Hkv, S]: the chunk's token j - p that sink j is, as a row of the flat chunk; any if it is none."""

        def build(b: Builder) -> ir.Value:
            sinks = b.ints(np.arange(self.num_sinks).reshape(1, 1, -1), "sinks")
            token = b.op("Sub", [sinks, self._column(b, self.position, 3)])
            token = b.op("Max", [b.op("Min", [token, b.ints(self.num_tokens - 1, "last")]), b.ints(0, "zero")])
            return b.op("Add", [token, self._row_offsets(b, self.num_tokens)])

        return self.once("sink sources", build)

    def _row_offsets(self, b: Builder, length: int) -> ir.Value:
        """int64 [B, Hkv, 1]: the first row of each head in the flat [B*Hkv*length, D]."""
        heads = np.arange(self.batch * self.num_kv_heads).reshape(self.batch, self.num_kv_heads, 1)
        return b.ints(heads * length, "first_rows")

    def _becomes_sink(self) -> ir.Value:
        """bool [B, 1, S, 1]: p <= j < p + n."""

        def build(b: Builder) -> ir.Value:
            sinks = b.ints(np.arange(self.num_sinks).reshape(1, 1, -1, 1), "sinks")
            first = self._column(b, self.position, 4)
            end = b.op("Add", [first, self._column(b, self._num_valid(), 4)])
            return b.op("And", [b.op("GreaterOrEqual", [sinks, first]), b.op("Less", [sinks, end])])

        return self.once("becomes sink", build)

    def _counts(self, rank: int) -> ir.Value:
        """bool [B, 1, T, 1], or [B, 1, T] for a rank of 3: whether a token of the chunk is valid."""

        def build(b: Builder) -> ir.Value:
            tokens = b.ints(np.arange(self.num_tokens).reshape(1, 1, -1, *[1] * (rank - 3)), "tokens")
            return b.op("Less", [tokens, self._column(b, self._num_valid(), rank)])

        return self.once(f"counts of rank {rank}", build)

    def _mask(self) -> ir.Value:
        """[B, 1, 1, T, S + W + T]: 0 where token t sees an entry, or what ALiBi adds there for each head; where it does
        not, what makes its weight 0.

        That is the lowest finite number: -inf would give NaN in rows that see nothing, those of an idle stream.
        """
        dtype = self.q.dtype or ir.DataType.FLOAT

        def build(b: Builder) -> ir.Value:
            seen = self._seen(b)
            lowest = float(np.finfo(dtype.numpy()).min)
            return self.biased(b, seen, lambda: b.reshape(self._distances(b), known_shape(seen)), lowest)

        return self.once("mask", build)

    def _share(self) -> ir.Value:
        """[B, 1, 1, T, S + W + T]: see `shared_out`; any in rows of tokens that do not count."""

        def build(b: Builder) -> ir.Value:
            t = b.reshape(self._positions(b), (self.batch, 1, 1, self.num_tokens, 1))
            return self.shared_out(b, self._seen(b), t)

        return self.once("share", build)

    def _seen(self, b: Builder) -> ir.Value:
        """bool [B, 1, 1, T, S + W + T]: whether token t sees an entry."""
        parts = [self._sees_window(b), self._sees_evicted(b)]
        if self.num_sinks:
            parts.insert(0, self._sees_sinks(b))
        entries = sum(known_shape(part)[-1] for part in parts)
        shape = (self.batch, 1, 1, self.num_tokens, entries)
        return b.reshape(b.op("Concat", parts, (shape[0], *shape[3:]), axis=-1), shape)

    def _positions(self, b: Builder) -> ir.Value:
        """int64 [B, T, 1]: t of each token of the chunk."""
        tokens = b.ints(np.arange(self.num_tokens).reshape(1, -1, 1), "tokens")
        return b.op("Add", [self._column(b, self.position, 3), tokens])

    def _sees_sinks(self, b: Builder) -> ir.Value:
        """bool [B, T, S]: j <= t."""
        sinks = b.ints(np.arange(self.num_sinks).reshape(1, 1, -1), "sinks")
        return b.op("LessOrEqual", [sinks, self._positions(b)])

    def _distances(self, b: Builder) -> ir.Value:
        """int64 [B, T, S + W + T]: how far each entry is from each token in the cache; any where it is not seen."""
        t = self._positions(b)
        parts = self._distances_in_window(b, t)
        if self.num_sinks:
            place = b.op("Min", [t, b.ints(self.num_sinks + self.window_size - 1, "last_place")])
            parts.insert(0, b.op("Sub", [place, b.ints(np.arange(self.num_sinks).reshape(1, 1, -1), "sinks")]))
        entries = sum(known_shape(part)[-1] for part in parts)
        return b.op("Concat", parts, (self.batch, self.num_tokens, entries), axis=-1)

    def _distances_in_window(self, b: Builder, t: ir.Value) -> list[ir.Value]:
        """Those of slots [B, T, W] and of evicted rows [B, T, T]."""
        window = b.op("Sub", [t, self._window_tokens(b)])
        tokens = np.arange(self.num_tokens)
        query = np.broadcast_to(tokens[:, None] + self.window_size, (self.batch, self.num_tokens, 1))
        # (p + i) - (p + m - W)
        if self.batch * self.num_tokens**2 * 8 <= LARGE_CONSTANT_BYTES:
            return [window, b.ints(query - tokens, "distance_of_evicted")]
        row = b.ints(tokens.reshape(1, 1, -1), "tokens")
        return [window, b.op("Sub", [b.ints(query, "tokens_after_window"), row])]

    def _sees_window(self, b: Builder) -> ir.Value:
        """bool [B, T, W]: the token u in a slot after the chunk is no sink, and none that comes later: S <= u <= t.

        It cannot be too old: t - u < W for every valid t.
        """
        token = self._window_tokens(b)
        is_no_sink = b.op("GreaterOrEqual", [token, b.ints(self.num_sinks, "num_sinks")])
        return b.op("And", [is_no_sink, b.op("LessOrEqual", [token, self._positions(b)])])

    def _window_tokens(self, b: Builder) -> ir.Value:
        """int64 [B, 1, W]: the token u in each slot after the chunk; u < S if it is none.

        u = last - ((last - S - slot) mod W), last = p + n - 1.
        """
        last = self._column(b, self._last(b), 3)
        slots = b.range(self.num_sinks, (1, 1, self.window_size), "slots_after_sinks")
        age = b.op("Mod", [b.op("Sub", [last, slots]), b.ints(self.window_size, "window_size")])  # [B, 1, W]
        return b.op("Sub", [last, age])

    def _last(self, b: Builder) -> ir.Value:
        """int64 [B]: p + n - 1, of the last token that counts."""
        return b.op("Sub", [b.op("Add", [self.position, self._num_valid()]), b.ints(1, "one")])

    def _sees_evicted(self, b: Builder) -> ir.Value:
        """bool [B, T, T]: token i sees the row that token m replaces, u = p + m - W, if u >= S, i < m and m < n."""
        tokens = np.arange(self.num_tokens)
        column, row = tokens.reshape(1, -1, 1), tokens.reshape(1, 1, -1)
        if self.num_tokens**2 <= LARGE_CONSTANT_BYTES:
            earlier = b.bools((column < row)[0], "earlier")
        else:
            earlier = b.op("Less", [b.ints(column, "tokens"), b.ints(row, "tokens")])
        replaced = b.op("Add", [self._column(b, self.position, 3), b.ints(row - self.window_size, "replaced")])
        in_window = b.op("GreaterOrEqual", [replaced, b.ints(self.num_sinks, "num_sinks")])
        valid = b.op("Less", [b.ints(row, "tokens"), self._column(b, self._num_valid(), 3)])
        return b.op("And", [b.op("And", [in_window, valid]), earlier])
