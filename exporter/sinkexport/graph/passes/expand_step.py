"""SinkAttention over one token a stream, in standard operators: bound by how fast the cache can be read.

No state is transposed, sliced, joined or copied: the window is written by TensorScatter, which ONNX Runtime does in
place when input and output are bound to one buffer, and keys are read as the *left* operand of a matrix-vector
product, K [W, D] @ q [D, 1], so that they never have to be turned.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape, replace_node
from sinkexport.graph.passes.attention_parts import AttentionParts, operand


class StepAttention(AttentionParts):
    """Expands one node with T = 1."""

    def expand(self) -> None:
        b = self.b
        # With one query head a key head the plain four axes do; otherwise an axis of the group is put in between.
        heads = (self.batch, self.num_kv_heads)
        grouped, shared = (heads, heads) if self.group == 1 else ((*heads, self.group), (*heads, 1))
        capacity = self.num_sinks + self.window_size

        states = self._write()
        sinks, window = states[:-2], states[-2:]
        q = self.scaled(self.q)
        keys_and_queries = [(window[0], q, self.window_size)]
        if self.num_sinks:
            keys_and_queries.insert(0, (sinks[0], self.turned_back(q), self.num_sinks))
        logits = [
            b.matmul(b.reshape(keys, (*shared, length, self.head_dim)), b.reshape(query, (*grouped, self.head_dim, 1)))
            for keys, query, length in keys_and_queries
        ]  # [B, Hkv, G, S, 1] and [B, Hkv, G, W, 1]
        joined = logits[0] if len(logits) == 1 else b.op("Concat", logits, (*grouped, capacity, 1), axis=-2)
        joined = self.softcapped(b.reshape(joined, (*grouped, 1, capacity)))
        weights = b.op("Softmax", [b.op("Add", [joined, self._mask(len(grouped) + 2)])], axis=-1)
        pieces = b.split(weights, [length for *_, length in keys_and_queries], -1) if self.num_sinks else [weights]
        out = self._weighted_sum(pieces[-1], window[1], shared)
        if self.num_sinks:
            out = b.op("Add", [self._weighted_sum(pieces[0], sinks[1], shared, of_sinks=True), out])
        out = b.reshape(out, (self.batch, self.num_q_heads, 1, self.head_dim))
        replace_node(self.node, b.nodes, [out, *(states if self.num_sinks else [None, None, *states])])

    def _weighted_sum(
        self, weights: ir.Value, values: ir.Value, shared: tuple[int, ...], *, of_sinks: bool = False
    ) -> ir.Value:
        """weights [B, Hkv, (G,) 1, n] over values [B, Hkv, n, D] -> [B, Hkv, (G,) 1, D]."""
        b = self.b
        *_, length, head_dim = known_shape(values)
        if len(shared) > 2 or not of_sinks:
            return b.matmul(weights, b.reshape(values, (*shared, length, head_dim)))
        # One query head a key head: TensorRT-RTX 1.7.1 crashes while it builds this product of 1 x S by S x D next
        # to that of the window. For a handful of sinks a sum of products is as quick.
        products = b.op("Mul", [b.reshape(weights, (*shared, length, 1)), values])
        return b.op("ReduceSum", [products, b.ints([-2], "axes")], (*shared, 1, head_dim), keepdims=1)

    def _write(self) -> list[ir.Value]:
        """The states after this token: [sink_k, sink_v,] window_k, window_v."""
        b, states = self.b, []
        if self.num_sinks:
            for i, new in ((3, self.k), (4, self.v)):
                sinks = operand(self.node, i)
                states.append(b.op("Where", [self._is_this_token(), new, sinks], known_shape(sinks), new.dtype))
        for i, new in ((5, self.k), (6, self.v)):
            window = operand(self.node, i)
            states.append(
                b.op("TensorScatter", [window, new, self._slot()], known_shape(window), mode="linear", axis=2)
            )
        return states

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
        """[B, 1, .., C]: 0 where a token is, -inf where none is yet.

        Sink j is there from t = j on, slot i from t = S + i on: entry n of sinks-then-slots from t = n on.
        """
        capacity, dtype = self.num_sinks + self.window_size, self.q.dtype

        def build(b: Builder) -> ir.Value:
            t = b.reshape(self.position, (self.batch, *[1] * (rank - 1)))
            entries = b.ints(np.arange(capacity).reshape(*[1] * (rank - 1), capacity), "entries")
            there = b.op("LessOrEqual", [entries, t])
            return b.op("Where", [there, b.scalar(0.0, dtype), b.scalar(-math.inf, dtype)],
                        known_shape(there), dtype)

        return self.once(f"mask of rank {rank}", build)
