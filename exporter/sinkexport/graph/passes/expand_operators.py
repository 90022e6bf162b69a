"""The portable form: SinkAttention and StreamAngles in standard operators (opset 24), one token a step.

What depends on the position alone (ring slot, mask, sink selection, angles) is computed once a step and shared by
all layers. No state is transposed, sliced, joined or copied: the window is written by TensorScatter, which
ONNX Runtime does in place when input and output are bound to one buffer, and keys are read as the *left* operand
of a matrix-vector product, K [W, D] @ q [D, 1], so that they never have to be turned.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from sinkrt.ring import TURN

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape, replace_node
from sinkexport.graph.operators import DOMAIN, SINK_ATTENTION, STREAM_ANGLES


def expand_operators(model: ir.Model) -> None:
    """Replace every node of domain ``ai.sinkexport`` by standard operators."""
    per_step: dict[object, ir.Value] = {}
    for node in list(model.graph):
        if node.domain != DOMAIN:
            continue
        if node.op_type == STREAM_ANGLES:
            _expand_angles(model.graph, node)
        elif node.op_type == SINK_ATTENTION:
            _SinkAttention(model.graph, node, per_step).expand()
        else:
            raise ValueError(f"unknown operator {node.domain}::{node.op_type}")
    model.opset_imports.pop(DOMAIN, None)


def _expand_angles(graph: ir.Graph, node: ir.Node) -> None:
    """cos and sin [B, 1, R/2] of ``max(0, position - behind) * f`` turns; see ``model.attention.stream_angles``."""
    position, frequency = _operand(node, 0), _operand(node, 1)
    batch, pairs = known_shape(position)[0], known_shape(frequency)[0]
    behind = node.attributes["behind"].as_int()
    b = Builder(graph)
    t = position
    if behind:
        t = b.op("Max", [b.op("Sub", [t, b.ints(behind, "behind")]), b.ints(0, "zero")])
    t = b.reshape(t, (batch, 1, 1))
    half_word, turn = b.ints(2**16, "half_word"), b.ints(TURN, "turn")
    high = b.op("Div", [t, half_word])  # t >= 0, so truncation is floor
    low = b.op("Sub", [t, b.op("Mul", [high, half_word])])
    high_part = b.op("Mul", [b.op("Mod", [b.op("Mul", [high, frequency]), turn]), half_word])
    phase = b.op("Add", [high_part, b.op("Mul", [low, frequency])])  # [B, 1, R/2]
    centred = b.op("Sub", [b.op("Mod", [b.op("Add", [phase, b.ints(TURN // 2, "half_turn")]), turn]),
                           b.ints(TURN // 2, "half_turn")])
    shape = (batch, 1, pairs)
    angle = b.op("Cast", [centred], shape, ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
    angle = b.op("Mul", [angle, b.scalar(2 * math.pi / TURN, ir.DataType.FLOAT)])
    replace_node(node, b.nodes, [b.op("Cos", [angle]), b.op("Sin", [angle])])


class _SinkAttention:
    """Expands one node; `per_step` holds what all nodes of a graph share."""

    def __init__(self, graph: ir.Graph, node: ir.Node, per_step: dict[object, ir.Value]) -> None:
        self._graph, self._node, self._per_step = graph, node, per_step
        self._position = _operand(node, 7)
        self._window_size = known_shape(_operand(node, 5))[2]
        self._num_sinks = known_shape(_operand(node, 3))[2] if _optional(node, 3) is not None else 0
        self._b = Builder(graph)

    def expand(self) -> None:
        node, b = self._node, self._b
        q, k, v = (_operand(node, i) for i in range(3))
        batch, num_q_heads, _, head_dim = known_shape(q)
        num_kv_heads = known_shape(k)[1]
        group = num_q_heads // num_kv_heads
        # With one query head a key head the plain four axes do; otherwise an axis of the group is put in between.
        grouped = (batch, num_kv_heads) if group == 1 else (batch, num_kv_heads, group)
        shared = (batch, num_kv_heads) if group == 1 else (batch, num_kv_heads, 1)
        capacity = self._num_sinks + self._window_size

        states = self._write(k, v)
        sinks, window = states[:-2], states[-2:]
        q = b.op("Mul", [q, b.scalar(node.attributes["scale"].as_float(), q.dtype)])
        keys_and_queries = [(window[0], q, self._window_size)]
        if self._num_sinks:
            keys_and_queries.insert(0, (sinks[0], self._turned_back(q), self._num_sinks))
        logits = [
            b.matmul(b.reshape(keys, (*shared, length, head_dim)), b.reshape(query, (*grouped, head_dim, 1)))
            for keys, query, length in keys_and_queries
        ]  # [B, Hkv, G, S, 1] and [B, Hkv, G, W, 1]
        joined = logits[0] if len(logits) == 1 else b.op("Concat", logits, (*grouped, capacity, 1), axis=-2)
        joined = self._softcapped(b.reshape(joined, (*grouped, 1, capacity)))
        weights = b.op("Softmax", [b.op("Add", [joined, self._mask(len(grouped) + 2, q.dtype)])], axis=-1)
        pieces = b.split(weights, [length for *_, length in keys_and_queries], -1) if self._num_sinks else [weights]
        values = [*([sinks[1]] if self._num_sinks else []), window[1]]
        parts = [self._weighted_sum(pieces[-1], values[-1], shared)]
        if self._num_sinks:
            parts.insert(0, self._weighted_sum(pieces[0], values[0], shared, of_sinks=True))
        out = parts[0] if len(parts) == 1 else b.op("Add", parts)
        out = b.reshape(out, (batch, num_q_heads, 1, head_dim))
        self._finish([out, *(states if self._num_sinks else [None, None, *states])])

    def _weighted_sum(
        self, weights: ir.Value, values: ir.Value, shared: tuple[int, ...], *, of_sinks: bool = False
    ) -> ir.Value:
        """weights [B, Hkv, (G,) 1, n] over values [B, Hkv, n, D] -> [B, Hkv, (G,) 1, D]."""
        b = self._b
        *_, length, head_dim = known_shape(values)
        if len(shared) > 2 or not of_sinks:
            return b.matmul(weights, b.reshape(values, (*shared, length, head_dim)))
        # One query head a key head: TensorRT-RTX 1.7.1 crashes while it builds this product of 1 x S by S x D next
        # to that of the window. For a handful of sinks a sum of products is as quick.
        products = b.op("Mul", [b.reshape(weights, (*shared, length, 1)), values])
        return b.op("ReduceSum", [products, b.ints([-2], "axes")], (*shared, 1, head_dim), keepdims=1)

    def _finish(self, outputs: list[ir.Value | None]) -> None:
        """Absent sinks have outputs that nothing reads: they vanish with the node."""
        graph, node = self._graph, self._node
        graph.insert_before(node, self._b.nodes)
        for old, new in zip(node.outputs, outputs, strict=True):
            if new is not None:
                ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(node, safe=True)

    def _write(self, k: ir.Value, v: ir.Value) -> list[ir.Value]:
        """The states after this token: [sink_k, sink_v,] window_k, window_v."""
        b, node = self._b, self._node
        states = []
        if self._num_sinks:
            for i, new in ((3, k), (4, v)):
                states.append(b.op("Where", [self._is_this_token(), new, _operand(node, i)],
                                   known_shape(_operand(node, i)), new.dtype))
        for i, new in ((5, k), (6, v)):
            window = _operand(node, i)
            states.append(
                b.op("TensorScatter", [window, new, self._slot()], known_shape(window), mode="linear", axis=2)
            )
        return states

    def _turned_back(self, q: ir.Value) -> ir.Value:
        """The query as the sinks see it, R(-shift) q; q itself in a layer without positions."""
        cos, sin = _optional(self._node, 8), _optional(self._node, 9)
        if cos is None or sin is None:
            return q
        minus_sin = self._once(("minus", sin), lambda b: b.op("Neg", [sin]))
        rotary_dim = 2 * known_shape(cos)[-1]
        return self._b.op(
            "RotaryEmbedding", [q, cos, minus_sin], known_shape(q),
            interleaved=self._node.attributes["interleaved"].as_int(),
            rotary_embedding_dim=rotary_dim if rotary_dim < known_shape(q)[-1] else 0,
        )  # fmt: skip

    def _softcapped(self, logits: ir.Value) -> ir.Value:
        cap = self._node.attributes["softcap"].as_float()
        if not cap:
            return logits
        b = self._b
        squashed = b.op("Tanh", [b.op("Mul", [logits, b.scalar(1.0 / cap, logits.dtype)])])
        return b.op("Mul", [squashed, b.scalar(cap, logits.dtype)])

    def _slot(self) -> ir.Value:
        """int64 [B]: (t - S) mod W. While t < S it names a slot that is masked until it is written again."""

        def build(b: Builder) -> ir.Value:
            t = self._position
            if self._num_sinks:
                t = b.op("Sub", [t, b.ints(self._num_sinks, "num_sinks")])
            return b.op("Mod", [t, b.ints(self._window_size, "window_size")])  # sign of the divisor: never < 0

        return self._once(("slot", self._position, self._num_sinks, self._window_size), build)

    def _is_this_token(self) -> ir.Value:
        """bool [B, 1, S, 1]: the sink that this step's token is, if it is one."""

        def build(b: Builder) -> ir.Value:
            batch = known_shape(self._position)[0]
            t = b.reshape(self._position, (batch, 1, 1, 1))
            sinks = b.ints(np.arange(self._num_sinks).reshape(1, 1, -1, 1), "sinks")
            return b.op("Equal", [sinks, t], dtype=ir.DataType.BOOL)

        return self._once(("sink", self._position, self._num_sinks), build)

    def _mask(self, rank: int, dtype: ir.DataType | None) -> ir.Value:
        """[B, 1, .., C]: 0 where a token is, -inf where none is yet.

        Sink j is there from t = j on, slot i from t = S + i on: entry n of sinks-then-slots from t = n on.
        """
        capacity = self._num_sinks + self._window_size

        def build(b: Builder) -> ir.Value:
            batch = known_shape(self._position)[0]
            t = b.reshape(self._position, (batch, *[1] * (rank - 1)))
            entries = b.ints(np.arange(capacity).reshape(*[1] * (rank - 1), capacity), "entries")
            there = b.op("LessOrEqual", [entries, t], dtype=ir.DataType.BOOL)
            return b.op("Where", [there, b.scalar(0.0, dtype), b.scalar(-math.inf, dtype)],
                        known_shape(there), dtype)

        return self._once(("mask", self._position, capacity, rank, dtype), build)

    def _once(self, key: object, build: object) -> ir.Value:
        """Build a value of the step the first time that it is asked for, before the first node that needs it."""
        if key not in self._per_step:
            b = Builder(self._graph)
            self._per_step[key] = build(b)  # type: ignore[operator]
            self._graph.insert_before(self._node, b.nodes)
        return self._per_step[key]


def _optional(node: ir.Node, index: int) -> ir.Value | None:
    """An input that may be absent; trailing absent ones are not even listed."""
    return node.inputs[index] if index < len(node.inputs) else None


def _operand(node: ir.Node, index: int) -> ir.Value:
    value = _optional(node, index)
    if value is None:
        raise ValueError(f"{node.op_type} '{node.name}' has no input {index}")
    return value
