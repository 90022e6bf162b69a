"""BlockAttention (model/block_attention.py) in standard operators: a block of T tokens a run, bidirectional inside.

Unlike a chunk of text, a block needs no key that it evicts: all of its tokens see the same W blocks, itself the last.
So it is written first, in one piece that never runs past the ring's end, and read with what is there.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from sinkexport.graph.attention.parts import AttentionParts
from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape, operand
from sinkexport.graph.operators import Input


class BlockAttention(AttentionParts):
    """Expands one node. num_sinks and window_size are tokens here, whole blocks of num_tokens."""

    def expand(self) -> None:
        b, rows = self.b, self.group * self.num_tokens
        sinks, window = self._write_sinks(), self._write_window()
        q = self.scaled(self.q)
        parts = [(q, *window)]
        if sinks:
            parts.insert(0, (self.turned_back(q), *sinks))
        heads = (self.batch, self.num_kv_heads)
        lengths = [known_shape(keys)[2] for _, keys, _ in parts]
        logits = [
            b.matmul(b.reshape(query, (*heads, rows, self.head_dim)), self.transposed(keys)) for query, keys, _ in parts
        ]  # [B, Hkv, G * T, S * T] and [.., W * T]
        joined = logits[0] if len(logits) == 1 else b.op("Concat", logits, (*heads, rows, sum(lengths)), axis=-1)
        weights = b.op("Softmax", [b.op("Add", [joined, self._mask()])], axis=-1)
        pieces = b.split(weights, lengths, -1) if sinks else [weights]
        sums = [b.matmul(piece, values) for piece, (_, _, values) in zip(pieces, parts, strict=True)]
        out = sums[0] if len(sums) == 1 else b.op("Add", sums)  # [B, Hkv, G * T, D]
        out = b.reshape(out, (self.batch, self.num_q_heads, self.num_tokens, self.head_dim))
        self.replace_node(out, sinks, window)

    @property
    def _num_sink_blocks(self) -> int:
        return self.num_sinks // self.num_tokens

    @property
    def _num_window_blocks(self) -> int:
        return self.window_size // self.num_tokens

    def _write_sinks(self) -> list[ir.Value]:
        """sink_k, sink_v after the block: each sink block is offered it, and the one that it is takes it."""
        b, states = self.b, []
        if self.num_sinks:
            for i, new in ((Input.SINK_K, self.k), (Input.SINK_V, self.v)):
                old = operand(self.node, i)
                offered = b.op("Tile", [new, b.ints([1, 1, self._num_sink_blocks, 1], "blocks")], known_shape(old))
                states.append(b.op("Where", [self._is_this_block(), offered, old], known_shape(old), new.dtype))
        return states

    def _write_window(self) -> list[ir.Value]:
        news = ((Input.WINDOW_K, self.k), (Input.WINDOW_V, self.v))
        return [self.write_rows(operand(self.node, i), new, self._first_row()) for i, new in news]

    def _slot(self) -> ir.Value:
        """int64 [B]: (block - S) mod W."""

        def build(b: Builder) -> ir.Value:
            after_sinks = b.op("Sub", [self.position, b.ints(self._num_sink_blocks, "num_sinks")])
            return b.op("Mod", [after_sinks, b.ints(self._num_window_blocks, "window")])

        return self.once("slot of block", build)

    def _first_row(self) -> ir.Value:
        def build(b: Builder) -> ir.Value:
            return b.op("Mul", [self._slot(), b.ints(self.num_tokens, "block_size")])

        return self.once("row of block", build)

    def _is_this_block(self) -> ir.Value:
        """bool [B, 1, S * T, 1]."""

        def build(b: Builder) -> ir.Value:
            blocks = np.arange(self.num_sinks).reshape(1, 1, -1, 1) // self.num_tokens
            return b.op("Equal", [b.ints(blocks, "sink_blocks"), b.reshape(self.position, (self.batch, 1, 1, 1))])

        return self.once("sink block", build)

    def _mask(self) -> ir.Value:
        """[B, 1, 1, (S + W) * T]: 0 where a block is seen, -inf elsewhere. The block itself always is."""
        dtype = self.q.dtype or ir.DataType.FLOAT

        def build(b: Builder) -> ir.Value:
            column = (self.batch, 1)
            slots = b.ints(np.arange(self._num_window_blocks)[None], "slots")
            age = b.op(
                "Mod",
                [b.op("Sub", [b.reshape(self._slot(), column), slots]), b.ints(self._num_window_blocks, "window")],
            )  # [B, W]
            block = b.op("Sub", [b.reshape(self.position, column), age])
            oldest = b.op("Max", [operand(self.node, Input.OLDEST), b.ints(self._num_sink_blocks, "num_sinks")])
            there = b.op("GreaterOrEqual", [block, b.reshape(oldest, column)])
            shape = (self.batch, self._num_window_blocks, self.num_tokens)
            there = b.op("Expand", [b.reshape(there, (*shape[:2], 1)), b.ints(shape, "shape")], shape)
            parts = [b.reshape(there, (self.batch, self.window_size))]
            if self.num_sinks:
                blocks = np.arange(self.num_sinks)[None] // self.num_tokens
                parts.insert(0, b.op("LessOrEqual", [b.ints(blocks, "sink_blocks"), b.reshape(self.position, column)]))
            capacity = self.num_sinks + self.window_size
            seen = parts[0] if len(parts) == 1 else b.op("Concat", parts, (self.batch, capacity), axis=1)
            seen = b.reshape(seen, (self.batch, 1, 1, capacity))
            return b.op("Where", [seen, b.scalar(0.0, dtype), b.scalar(-math.inf, dtype)], known_shape(seen), dtype)

        return self.once("mask of blocks", build)
