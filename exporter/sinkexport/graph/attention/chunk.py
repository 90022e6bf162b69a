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

from sinkexport.graph.attention.chunk_parts import ChunkParts
from sinkexport.graph.attention.parts import FLOAT
from sinkexport.graph.edit import constant, known_shape
from sinkexport.graph.operators import Input

Written = tuple[list[ir.Value], list[ir.Value], list[ir.Value]]
"""States of the window, then keys and values of it, [B, Hkv, W, D or Dv], and of evicted rows, [.., T, ..]."""


class ChunkAttention(ChunkParts):
    """Expands one node with T > 1. t: position of a token; p: position of the first; n: num_valid."""

    def expand(self) -> None:
        sinks, (states, window, evicted) = self.written(lambda: (self._write_sinks(), self._write_window()))
        q = self.scaled(self.q)
        parts = [(q, *window), (q, *evicted)]
        if sinks:
            # A sink inside this very chunk is at its true distance, which a shift of 0 gives: t <= S + W - 2 = C - 2.
            parts.insert(0, (self.turned_back(q), *sinks))
        weights, mass = self.weights_of(parts), None
        if self.mass is not None:
            weights, mass = self._calibrated(weights, self.mass)
        weights = self.with_affine(weights, self._share)
        self.replace_node(self.output_of(weights, parts), sinks, states, mass)

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
        for old, new in self.new_rows(Input.SINK_K, Input.SINK_V) if self.num_sinks else ():
            taken = self._rows(new, self._sink_sources(), self.num_sinks)
            states.append(b.op("Where", [self._becomes_sink(), taken, old], known_shape(old), new.dtype))
        return self.as_keys_and_values(states)

    def _write_window(self) -> Written:
        """The window's states after the chunk, and what attention reads."""
        pairs = [self._exchange(state, new) for state, new in self.new_rows(Input.WINDOW_K, Input.WINDOW_V)]
        window, evicted = (self.as_keys_and_values([pair[i] for pair in pairs]) for i in range(2))
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

        Without a circular TensorScatter each slot selects its row. That touches the whole window, T times as seldom as
        a step does; a slot reads no other slot, so one buffer stays safe.
        """
        if self.has_circular_scatter:
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
