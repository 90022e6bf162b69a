"""SinkAttention over one token a stream, in standard operators: bound by how fast the cache can be read.

No state is transposed, sliced, joined or copied. The window is written by TensorScatter, which ONNX Runtime does in
place when input and output are bound to one buffer. Keys are read as the *left* operand of a matmul,
K [W, D] @ q [D, 1], so that they never have to be turned.

Few query heads of a key head take a matmul each. Many share one, K [W, D] @ q [D, G]; the small operands, queries and
logits, are turned before and after it. One layer's attention on ONNX Runtime, microseconds, with one | two threads
of an AMD EPYC with AVX-512 (beside other work, in turns):

    Hkv, G, W, D         a matmul each     one for all
    3, 3, 1020, 64          54 |   47         62 |   57
    8, 4, 1020, 128        307 |  283        295 |  279
    8, 4, 4092, 128       2808 | 3788       2153 | 3689
    4, 5, 1020, 64         106 |   97         85 |   75
    2, 7, 1020, 64          73 |   61         50 |   50
    4, 8, 1020, 128        314 |  298        175 |  172
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from sinkexport.graph.attention.parts import FLOAT, AttentionParts
from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape
from sinkexport.graph.operators import Input

MANY_HEADS = 4
"""Query heads of a key head from which on one matmul serves them all."""


class StepAttention(AttentionParts):
    """Expands one node with T = 1."""

    def expand(self) -> None:
        b = self.b
        sinks, window = self.written(lambda: (self._write_sinks(), self._write_window()))
        q = self.scaled(self.q)
        logits, lengths = [self._window_logits(q, window)], [self.window_size]
        if self.num_sinks:
            logits.insert(0, self._logits(self.turned_back(q), sinks[0]))
            lengths.insert(0, self.num_sinks)
        capacity = sum(lengths)
        logits = self.with_sink_scale(logits, (1, *self._grouped[1:], self.num_sinks, 1))
        joined = logits[0] if len(logits) == 1 else b.op("Concat", logits, (*self._grouped, capacity, 1), axis=-2)
        joined = b.reshape(joined, (*self._grouped, 1, capacity))
        joined = joined if self.has_sink_scale else self.softcapped(joined)
        rank = len(self._grouped) + 2
        weights = self.normalised(b.op("Add", [joined, self._mask(rank)]))
        needs_pieces = self.mass is not None or not self.has_affine
        pieces = b.split(weights, lengths, -1) if self.num_sinks and needs_pieces else [weights]
        mass = None
        if self.mass is not None:
            mass, *pieces = self._calibrated(self.mass, *pieces)
            weights = b.op("Concat", pieces, known_shape(weights), axis=-1) if self.has_affine else weights
        if self.has_affine:
            weights = self.with_affine(weights, lambda: self._share(rank))
            pieces = b.split(weights, lengths, -1) if self.num_sinks else [weights]
        out = self._window_sum(pieces[-1], window)
        if self.num_sinks:
            out = b.op("Add", [self._weighted_sum(pieces[0], sinks[1], of_sinks=True), out])
        self.replace_node(b.reshape(out, (self.batch, self.num_q_heads, 1, self.value_dim)), sinks, window, mass)

    # With one query head a key head the plain four axes do; otherwise an axis of the group is put in between.

    @property
    def _grouped(self) -> tuple[int, ...]:
        """[B, Hkv, (G)], leading axes of what each query head has."""
        heads = (self.batch, self.num_kv_heads)
        return heads if self.group == 1 else (*heads, self.group)

    @property
    def _shared(self) -> tuple[int, ...]:
        """[B, Hkv, (1)], leading axes of what the query heads of a key head share."""
        heads = (self.batch, self.num_kv_heads)
        return heads if self.group == 1 else (*heads, 1)

    def _window_logits(self, q: ir.Value, window: list[ir.Value]) -> ir.Value:
        """q [B, Hq, 1, D], scaled -> [B, Hkv, (G,) W, 1]."""
        return self._logits(q, window[0])

    def _window_sum(self, weights: ir.Value, window: list[ir.Value]) -> ir.Value:
        """weights [B, Hkv, (G,) 1, W] -> [B, Hkv, (G,) 1, Dv]."""
        return self._weighted_sum(weights, window[1])

    def _logits(self, q: ir.Value, keys: ir.Value) -> ir.Value:
        """q [B, Hq, 1, D], keys [B, Hkv, n, D] -> [B, Hkv, (G,) n, 1]."""
        b, length = self.b, known_shape(keys)[2]
        if self.group >= MANY_HEADS:
            query = b.reshape(q, (*self._grouped, self.head_dim))  # [B, Hkv, G, D]
            return b.reshape(self.transposed(b.matmul(keys, self.transposed(query))), (*self._grouped, length, 1))
        query = b.reshape(q, (*self._grouped, self.head_dim, 1))
        return b.matmul(b.reshape(keys, (*self._shared, length, self.head_dim)), query)

    def _weighted_sum(self, weights: ir.Value, values: ir.Value, *, of_sinks: bool = False) -> ir.Value:
        """weights [B, Hkv, (G,) 1, n] over values [B, Hkv, n, Dv] -> [B, Hkv, (G,) 1, Dv]."""
        b, shared = self.b, self._shared
        *_, length, value_dim = known_shape(values)
        if self.group >= MANY_HEADS:
            sums = b.matmul(b.reshape(weights, (*self._grouped, length)), values)  # [B, Hkv, G, Dv]
            return b.reshape(sums, (*self._grouped, 1, value_dim))
        if len(shared) > 2 or not of_sinks:
            return b.matmul(weights, b.reshape(values, (*shared, length, value_dim)))
        # One query head a key head: TensorRT-RTX 1.7.1 crashes while it builds this matmul of 1 x S by S x D next
        # to that of the window. For a handful of sinks a sum of products is as quick.
        products = b.op("Mul", [b.reshape(weights, (*shared, length, 1)), values])
        return b.op("ReduceSum", [products, b.ints([-2], "axes")], (*shared, 1, value_dim), keepdims=1)

    def _calibrated(self, mass: ir.Value, sinks: ir.Value, window: ir.Value) -> list[ir.Value]:
        """attention_mass after this token, and the weights [B, Hkv, (G,) 1, S] and [.., W], calibrated."""
        b, dtype, shape = self.b, sinks.dtype or FLOAT, known_shape(window)
        sinks, window = (b.cast(x, FLOAT) for x in (sinks, window))
        before = self.received_before(mass)
        kept = b.op("Where", [self._is_slot(), b.scalar(0.0, FLOAT), before], known_shape(before), FLOAT)
        received = b.op("Add", [kept, b.reshape(window, known_shape(kept))])
        pair = self.calibrated(sinks, window, b.reshape(received, shape), self._fair_share(len(shape)))
        return [self.received_after(mass, received, lambda _: self.position), *(b.cast(x, dtype) for x in pair)]

    def _fair_share(self, rank: int) -> ir.Value:
        """float32 [B, 1, .., 1, W]."""

        def build(b: Builder) -> ir.Value:
            t = b.reshape(self.position, (self.batch, *[1] * (rank - 1)))
            return self.share(b, t, self._window_distances(b, t))

        return self.once(f"fair share of rank {rank}", build)

    def _is_slot(self) -> ir.Value:
        """bool [B, 1, W]: where this step's token goes."""

        def build(b: Builder) -> ir.Value:
            slots = b.ints(np.arange(self.window_size).reshape(1, 1, -1), "slots")
            return b.op("Equal", [slots, b.reshape(self._slot(), (self.batch, 1, 1))])

        return self.once("is slot", build)

    def _write_sinks(self) -> list[ir.Value]:
        """sink_k, sink_v after this token; none if S = 0."""
        if not self.num_sinks:
            return []
        return self.as_keys_and_values(
            [
                self.b.op("Where", [self._is_this_token(), new, sinks], known_shape(sinks), new.dtype)
                for sinks, new in self.new_rows(Input.SINK_K, Input.SINK_V)
            ]
        )

    def _write_window(self) -> list[ir.Value]:
        """The window's states after this token: window_k, window_v."""
        rows = self.new_rows(Input.WINDOW_K, Input.WINDOW_V)
        return self.as_keys_and_values([self.write_rows(state, new, self._slot()) for state, new in rows])

    def _slot(self) -> ir.Value:
        """int64 [B]: (t - S) mod W. While t < S it names a slot that is masked until it is written again."""

        def build(b: Builder) -> ir.Value:
            t = self.position
            if self.num_sinks:
                t = b.op("Sub", [t, b.ints(self.num_sinks, "num_sinks")])
            return b.op("Mod", [t, b.ints(self.window_size, "window_size")])  # sign of the divisor: never < 0

        return self.once("slot", build)

    def _is_this_token(self) -> ir.Value:
        """bool [B, 1, S, 1]: the sink that this step's token is, if it is one."""

        def build(b: Builder) -> ir.Value:
            t = b.reshape(self.position, (self.batch, 1, 1, 1))
            sinks = b.ints(np.arange(self.num_sinks).reshape(1, 1, -1, 1), "sinks")
            return b.op("Equal", [sinks, t])

        return self.once("sink", build)

    def _mask(self, rank: int) -> ir.Value:
        """[B, 1, .., C]: 0 where a token is, or what ALiBi adds there for each head; -inf where none is yet.

        Sink j is there from t = j on, slot i from t = S + i on: entry n of sinks-then-slots from t = n on.
        """

        def build(b: Builder) -> ir.Value:
            there, t = self._there(b, rank)
            return self.biased(b, there, lambda: self._distances(b, t), -math.inf)

        return self.once(f"mask of rank {rank}", build)

    def _share(self, rank: int) -> ir.Value:
        """[B, 1, .., C]: see `shared_out`."""
        return self.once(f"share of rank {rank}", lambda b: self.shared_out(b, *self._there(b, rank)))

    def _there(self, b: Builder, rank: int) -> tuple[ir.Value, ir.Value]:
        """bool [B, 1, .., C], whether a token is in an entry, and t, int64 [B, 1, .., 1]."""
        capacity = self.num_sinks + self.window_size
        t = b.reshape(self.position, (self.batch, *[1] * (rank - 1)))
        entries = b.ints(np.arange(capacity).reshape(*[1] * (rank - 1), capacity), "entries")
        return b.op("LessOrEqual", [entries, t]), t

    def _distances(self, b: Builder, t: ir.Value) -> ir.Value:
        """int64 [B, 1, .., C]: how far each sink and slot is from the token at t [B, 1, .., 1] in the cache."""
        *ones, _ = known_shape(t)
        window = self._window_distances(b, t)
        if not self.num_sinks:
            return window
        capacity = self.num_sinks + self.window_size
        place = b.op("Min", [t, b.ints(capacity - 1, "last_place")])
        sinks = b.op("Sub", [place, b.ints(np.arange(self.num_sinks), "sinks")], (*ones, self.num_sinks))
        return b.op("Concat", [sinks, window], (*ones, capacity), axis=-1)

    def _window_distances(self, b: Builder, t: ir.Value) -> ir.Value:
        """int64 [B, 1, .., W]: those of the slots."""
        slots = b.ints(self.num_sinks + np.arange(self.window_size), "slots_after_sinks")
        shape = (*known_shape(t)[:-1], self.window_size)
        return b.op("Mod", [b.op("Sub", [t, slots], shape), b.ints(self.window_size, "window_size")], shape)
