"""SinkAttention over a chunk of T <= W tokens a stream, in standard operators: exactly T single tokens.

Early tokens of a chunk still need keys that later ones evict. So the rows that the chunk evicts are taken out first,
then the chunk is written, and attention reads three parts: sinks, window and evicted rows, each entry masked by the
distance that DESIGN's definition gives it. A token that does not count (num_valid) writes back the row that it found.

This order is carried by data alone: what is written depends on what was taken out, and attention reads what was
written. So it is safe that a state's input and output are one buffer, whatever order a runtime chooses.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sinkexport.graph.attention.parts import FLOAT, AttentionParts, operand
from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import constant, known_shape

Written = tuple[list[ir.Value], list[ir.Value], list[ir.Value]]
"""States of the window, then keys and values [B, Hkv, W, D] of it, and [B, Hkv, T, D] of the rows that were evicted."""


class ChunkAttention(AttentionParts):
    """Expands one node with T > 1. t: position of a token; p: position of the first; n: num_valid."""

    def expand(self) -> None:
        b, rows = self.b, self.group * self.num_tokens
        sinks, (states, window, evicted) = self._write_sinks(), self._write_window()
        q = self.scaled(self.q)
        parts = [(q, *window), (q, *evicted)]
        if sinks:
            # A sink inside this very chunk is at its true distance, which a shift of 0 gives: t <= S + W - 2 = C - 2.
            parts.insert(0, (self.turned_back(q), *sinks))
        heads = (self.batch, self.num_kv_heads)
        lengths = [known_shape(keys)[2] for _, keys, _ in parts]
        entries = sum(lengths)
        logits = [
            b.matmul(b.reshape(query, (*heads, rows, self.head_dim)), self.transposed(keys)) for query, keys, _ in parts
        ]  # [B, Hkv, G*T, S], [.., W] and [.., T]
        grouped = (*heads, self.group, self.num_tokens)
        if self.has_sink_scale:
            logits = [b.reshape(part, (*grouped, length)) for part, length in zip(logits, lengths, strict=True)]
            logits = self.with_sink_scale(logits, (1, self.num_kv_heads, self.group, 1, self.num_sinks))
        joined = b.op("Concat", logits, (*known_shape(logits[0])[:-1], entries), axis=-1)
        joined = b.reshape(joined, (*grouped, entries))
        joined = joined if self.has_sink_scale else self.softcapped(joined)
        weights, mass = self.normalised(b.op("Add", [joined, self._mask()])), None
        if self.mass is not None:
            weights, mass = self._calibrated(weights, self.mass)
        weights = self.with_affine(weights, self._share)
        # The values are joined: they are fewer than the weights, which would have to be cut up otherwise.
        values = b.op("Concat", [part[2] for part in parts], (*heads, entries, self.head_dim), axis=-2)
        out = b.matmul(b.reshape(weights, (*heads, rows, entries)), values)  # [B, Hkv, G*T, D]
        out = b.reshape(out, (self.batch, self.num_q_heads, self.num_tokens, self.head_dim))
        self.replace_node(out, sinks, states, mass)

    def _calibrated(self, weights: ir.Value, mass: ir.Value) -> tuple[ir.Value, ir.Value]:
        """weights [B, Hkv, G, T, S + W + T], calibrated, and attention_mass after the chunk.

        What an entry has received at token i is what it had before the chunk and what tokens 0 .. i give it; in a slot
        that the chunk writes nothing is left of before.
        """
        b, dtype, entries = self.b, weights.dtype or FLOAT, self.window_size + self.num_tokens
        sinks, others = b.split(b.cast(weights, FLOAT), (self.num_sinks, entries), -1)
        counted = b.op("Where", [self._counts_of_weights(), others, b.scalar(0.0, FLOAT)], known_shape(others), FLOAT)
        lower = constant(b.graph, np.tril(np.ones((self.num_tokens,) * 2, dtype=np.float32)), "until")
        given = b.matmul(lower, counted)  # [B, Hkv, G, T, W + T]
        before = self.received_before(mass)
        evicted = self._rows(before, self._slots_of_query_heads(), self.num_tokens)
        kept = b.op("Where", [self._is_new(), b.scalar(0.0, FLOAT), before], known_shape(before), FLOAT)
        before = b.op("Concat", [kept, evicted], (self.batch, self.num_q_heads, entries), axis=-1)
        before = b.reshape(before, (self.batch, self.num_kv_heads, self.group, 1, entries))
        received = b.op("Add", [given, before], known_shape(given))
        last = b.op(
            "Gather",
            [received, b.ints(self.num_tokens - 1, "last")],
            (self.batch, self.num_kv_heads, self.group, entries),
            FLOAT,
            axis=3,
        )
        after = b.split(b.reshape(last, known_shape(before)), (self.window_size, self.num_tokens), -1)[0]
        pair = self.calibrated(sinks, others, received, self._fair_share())
        joined = b.op("Concat", pair, known_shape(weights), axis=-1)
        after = b.reshape(after, known_shape(kept))
        return b.cast(joined, dtype), self.received_after(mass, after, self._last)

    def _write_sinks(self) -> list[ir.Value]:
        """sink_k, sink_v after the chunk; none if S = 0."""
        b, states = self.b, []
        if self.num_sinks:
            for i, new in ((3, self.k), (4, self.v)):
                old = operand(self.node, i)
                taken = self._rows(new, self._sink_sources(), self.num_sinks)
                states.append(b.op("Where", [self._becomes_sink(), taken, old], known_shape(old), new.dtype))
        return states

    def _write_window(self) -> Written:
        """The window's states after the chunk, and what attention reads."""
        pairs = [self._exchange(operand(self.node, i), new) for i, new in ((5, self.k), (6, self.v))]
        window, evicted = ([pair[i] for pair in pairs] for i in range(2))
        return window, window, evicted

    def _exchange(self, state: ir.Value, new: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Write the chunk's rows to a state of the window: the state afterwards, and the T rows that were there.

        state: [B, Hkv, W, D] or [B, Hkv, W]. new: [B, Hkv, T, D] or [B, Hkv, T].
        """
        evicted = self._rows(state, self._slots(), self.num_tokens)
        counts = self._counts(len(known_shape(new)))
        kept = self.b.op("Where", [counts, new, evicted], known_shape(new), new.dtype)
        return self._placed(state, kept), evicted

    def _placed(self, state: ir.Value, kept: ir.Value) -> ir.Value:
        """A state [B, Hkv, W, D] or [B, Hkv, W] with kept [B, Hkv, T, D] or [B, Hkv, T] in the chunk's slots.

        TensorRT's parser refuses a circular TensorScatter, so there each slot selects its row. That touches the whole
        window, T times as seldom as a step does; a slot reads no other slot, so one buffer stays safe.
        """
        if self.target != "tensorrt":
            return self.write_rows(state, kept, self._first_slot(), mode="circular")
        rows = self._rows(kept, self._token_of_slot(), self.window_size)
        is_written = self._is_in_chunk(len(known_shape(state)))
        return self.b.op("Where", [is_written, rows, state], known_shape(state), state.dtype)

    def _rows(self, values: ir.Value, index: ir.Value, num_rows: int) -> ir.Value:
        """Rows of values [B, Hkv, n, ..] by their index [B, Hkv, num_rows] in the flat [B*Hkv*n, ..]."""
        b = self.b
        batch, heads, length, *row = known_shape(values)
        flat = b.reshape(values, (batch * heads * length, *row))
        return b.op("Gather", [flat, index], (batch, heads, num_rows, *row), values.dtype, axis=0)

    # --- what depends on positions alone ---

    def _column(self, b: Builder, value: ir.Value, rank: int) -> ir.Value:
        """[B] -> [B, 1, ..]."""
        return b.reshape(value, (self.batch, *[1] * (rank - 1)))

    def _num_valid(self) -> ir.Value:
        return operand(self.node, 10)

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
            slots = b.ints(np.arange(self.window_size).reshape(1, 1, -1), "slots")
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
        tokens = np.arange(self.num_tokens)
        window = b.op("Sub", [t, self._window_tokens(b)])
        evicted = (tokens[:, None] - tokens[None, :] + self.window_size)[None]  # (p + i) - (p + m - W)
        return [window, b.ints(np.broadcast_to(evicted, (self.batch, *evicted.shape[1:])), "distance_of_evicted")]

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
        slots = b.ints(np.arange(self.window_size).reshape(1, 1, -1) + self.num_sinks, "slots_after_sinks")
        age = b.op("Mod", [b.op("Sub", [last, slots]), b.ints(self.window_size, "window_size")])  # [B, 1, W]
        return b.op("Sub", [last, age])

    def _last(self, b: Builder) -> ir.Value:
        """int64 [B]: p + n - 1, of the last token that counts."""
        return b.op("Sub", [b.op("Add", [self.position, self._num_valid()]), b.ints(1, "one")])

    def _sees_evicted(self, b: Builder) -> ir.Value:
        """bool [B, T, T]: token i sees the row that token m replaces, u = p + m - W, if u >= S, i < m and m < n."""
        tokens = np.arange(self.num_tokens)
        earlier = b.bools(tokens[:, None] < tokens[None, :], "earlier")
        replaced = b.op(
            "Add", [self._column(b, self.position, 3), b.ints(tokens.reshape(1, 1, -1) - self.window_size, "replaced")]
        )
        in_window = b.op("GreaterOrEqual", [replaced, b.ints(self.num_sinks, "num_sinks")])
        valid = b.op("Less", [b.ints(tokens.reshape(1, 1, -1), "tokens"), self._column(b, self._num_valid(), 3)])
        return b.op("And", [b.op("And", [in_window, valid]), earlier])
