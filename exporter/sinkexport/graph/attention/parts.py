"""Parts that a step, a chunk and a block have in common when attention is written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import numpy as np
import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import constant, known_shape, operand, optional, replace_node
from sinkexport.graph.operators import Input
from sinkexport.model.attention import TINY

FLOAT = ir.DataType.FLOAT
T = TypeVar("T")


class PerRun:
    """Values that depend on positions alone: computed once a run and shared by all layers."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._values: dict[object, ir.Value] = {}
        self._written: dict[ir.Value, object] = {}

    def once(self, key: object, before: ir.Node, build: Callable[[Builder], ir.Value]) -> ir.Value:
        """Build a value the first time that it is asked for, before the first node that needs it."""
        if key not in self._values:
            b = Builder(self._graph)
            value = build(b)
            self._graph.insert_before(before, b.nodes)
            self._values[key] = value
        return self._values[key]

    def written(self, state: ir.Value, write: Callable[[], T]) -> T:
        """What became of the cache of `state`: nodes that share a cache write it once, the first of them.

        The others read what it wrote. A second write would copy the state or, where both share a buffer, race with it.
        """
        if state not in self._written:
            self._written[state] = write()
        return cast("T", self._written[state])


class AttentionParts:
    """One SinkAttention node about to be expanded, and its pieces that do not depend on the number of tokens.

    batch, num_q_heads, num_tokens, head_dim, value_dim: B, Hq, T, D, Dv. num_kv_heads, group: Hkv, Hq / Hkv.
    num_sinks, window_size: S, W. b: collects the new nodes.
    latent_dim: 0, or of a latent cache the elements at the end of keys that are the values. One state is in place of
    two, and its rows are read twice; what a sum of rows has before them is cut off.
    has_circular_scatter: whether the target takes a TensorScatter that runs past the ring's end.
    """

    def __init__(self, graph: ir.Graph, node: ir.Node, per_run: PerRun, *, has_circular_scatter: bool = True) -> None:
        self.node, self.b, self._per_run = node, Builder(graph), per_run
        self.has_circular_scatter = has_circular_scatter
        self.q, self.k = (operand(node, i) for i in (Input.Q, Input.K))
        values = optional(node, Input.V)
        self.v = self.k if values is None else values
        self.latent_dim = 0 if values is not None else node.attributes["latent_dim"].as_int()
        self.batch, self.num_q_heads, self.num_tokens, self.head_dim = known_shape(self.q)
        self.num_kv_heads, self.value_dim = known_shape(self.k)[1], known_shape(self.v)[3]
        self.group = self.num_q_heads // self.num_kv_heads
        self.window_size = known_shape(operand(node, Input.WINDOW_K))[2]
        sink_k = optional(node, Input.SINK_K)
        self.num_sinks = 0 if sink_k is None else known_shape(sink_k)[2]
        self.position = operand(node, Input.POSITION)
        self.alibi_slopes = optional(node, Input.ALIBI_SLOPES)
        self.sink_logit = optional(node, Input.SINK_LOGIT)
        self.sink_scale = optional(node, Input.SINK_SCALE)
        self.affine_scale = optional(node, Input.AFFINE_SCALE)
        self.affine_bias = optional(node, Input.AFFINE_BIAS)
        self.has_affine = self.affine_scale is not None or self.affine_bias is not None
        self.mass = optional(node, Input.ATTENTION_MASS)
        self.calibrated_heads = optional(node, Input.CALIBRATED)

    def expand(self) -> None:
        """Put standard operators in the place of the node."""
        raise NotImplementedError

    def written(self, write: Callable[[], T]) -> T:
        """What `write` made of this node's cache, or an earlier node of the same cache."""
        return self._per_run.written(operand(self.node, Input.WINDOW_K), write)

    def new_rows(self, keys: Input, values: Input) -> list[tuple[ir.Value, ir.Value]]:
        """A state of keys and that of values, each with its new rows; of a latent cache the first alone."""
        rows = [(operand(self.node, keys), self.k)]
        return rows if self.latent_dim else [*rows, (operand(self.node, values), self.v)]

    def as_keys_and_values(self, rows: list[T]) -> list[T]:
        """Rows of keys, and of values: in a latent cache the same. There may be scales behind them, which stay."""
        return [*rows[:1], *rows] if self.latent_dim else rows

    @property
    def row_parts(self) -> tuple[int, int]:
        """Elements of a latent cache's row that turn, and that are values."""
        return self.head_dim - self.latent_dim, self.latent_dim

    def once(self, name: str, build: Callable[[Builder], ir.Value]) -> ir.Value:
        """A value that all layers of the same geometry share."""
        geometry = (self.num_sinks, self.window_size, self.num_kv_heads, self.group, self.q.dtype)
        return self._per_run.once((name, self.position, geometry, self.alibi_slopes), self.node, build)

    def scaled(self, q: ir.Value) -> ir.Value:
        """q times the attention's scale."""
        return self.b.op("Mul", [q, self.b.scalar(self.node.attributes["scale"].as_float(), q.dtype)])

    def turned_back(self, q: ir.Value) -> ir.Value:
        """The query as the sinks see it, R(-shift) q; q itself in a layer without positions."""
        cos, sin = optional(self.node, Input.SHIFT_COS), optional(self.node, Input.SHIFT_SIN)
        if cos is None or sin is None:
            return q
        minus_sin = self._per_run.once(("minus", sin), self.node, lambda b: b.op("Neg", [sin]))
        rotary_dim = 2 * known_shape(cos)[-1]
        return self.b.op(
            "RotaryEmbedding",
            [q, cos, minus_sin],
            known_shape(q),
            interleaved=self.node.attributes["interleaved"].as_int(),
            rotary_embedding_dim=rotary_dim if rotary_dim < self.head_dim else 0,
        )

    def transposed(self, rows: ir.Value) -> ir.Value:
        """[B, Hkv, n, D] -> [B, Hkv, D, n]; runtimes can fold it into a matmul that follows."""
        batch, heads, length, head_dim = known_shape(rows)
        return self.b.op("Transpose", [rows], (batch, heads, head_dim, length), perm=(0, 1, 3, 2))

    def write_rows(self, state: ir.Value, rows: ir.Value, slot: ir.Value, mode: str = "linear") -> ir.Value:
        """A state of the window with `rows` from each stream's `slot` on, in place where a runtime can.

        state: [B, Hkv, W, D], or [B, Hkv, W] for scales. rows: the same with fewer tokens. slot: int64 [B].
        mode: ``linear``, or ``circular`` if rows may run past the end.
        """
        return self.b.op("TensorScatter", [state, rows, slot], known_shape(state), mode=mode, axis=2)

    def with_sink_scale(self, logits: list[ir.Value], axes: Sequence[int]) -> list[ir.Value]:
        """Parts of the logits, sinks first, capped and with the logarithm of `sink_scale` added to that of token 0.

        Without factors they come back as they are, to be capped when they are joined. axes: shape of the sinks' logits
        with 1 for what has no part in it; its product is Hkv * G * S, in this order.
        """
        scale = self.sink_scale
        if scale is None:
            return logits
        if scale.const_value is None or not self.num_sinks:
            raise ValueError(f"'{self.node.name}': sink_scale must be constant, and there must be a sink")
        bias = np.zeros((self.num_q_heads, self.num_sinks))
        bias[:, 0] = np.log(scale.const_value.numpy().astype(np.float64))
        added = constant(self.b.graph, bias.reshape(axes).astype((self.q.dtype or ir.DataType.FLOAT).numpy()), "bias")
        sinks, *others = (self.softcapped(part) for part in logits)
        return [self.b.op("Add", [sinks, added]), *others]

    @property
    def has_sink_scale(self) -> bool:
        """Whether `with_sink_scale` changes and caps logits."""
        return self.sink_scale is not None

    def biased(self, b: Builder, seen: ir.Value, distances: Callable[[], ir.Value], unseen: float) -> ir.Value:
        """What is added to logits: where an entry is seen 0, or with ALiBi - slope * distance; `unseen` elsewhere.

        seen: bool [B, 1, .., n], rank 4 for G = 1 or 5, of one query head. distances: makes int64 [B, .., n] of a shape
        that broadcasts with it. Returns: a shape that broadcasts with [B, Hkv, (G,) T, n].
        """
        dtype = self.q.dtype or ir.DataType.FLOAT
        bias = b.scalar(0.0, dtype)
        if self.alibi_slopes is not None:
            slopes = b.op("Neg", [self._by_head(b, self.alibi_slopes, len(known_shape(seen)))])
            bias = b.cast(b.op("Mul", [b.cast(distances(), ir.DataType.FLOAT), slopes]), dtype)
        shape = np.broadcast_shapes(known_shape(seen), known_shape(bias))
        return b.op("Where", [seen, bias, b.scalar(unseen, dtype)], shape, dtype)

    def normalised(self, logits: ir.Value) -> ir.Value:
        """Softmax of logits [B, Hkv, (G,) T, n], which the sink logit of each head takes part in if there is one."""
        b, shape = self.b, known_shape(logits)
        if self.sink_logit is None:
            return b.op("Softmax", [logits], axis=-1)
        one = (*shape[:-1], 1)
        more = self._by_head(b, self.sink_logit, len(shape))
        more = b.op("Expand", [more, b.ints(one, "one_entry")], one, logits.dtype)
        joined = b.op("Concat", [logits, more], (*shape[:-1], shape[-1] + 1), axis=-1)
        return b.split(b.op("Softmax", [joined], axis=-1), (shape[-1], 1), -1)[0]

    def with_affine(self, weights: ir.Value, share: Callable[[], ir.Value]) -> ir.Value:
        """Softmax weights [B, Hkv, (G,) T, n] times `affine_scale`, and `affine_bias` shared out among the tokens seen.

        share: makes what broadcasts with the weights: 1 / their number where a token is seen, 0 elsewhere.
        """
        b, rank = self.b, len(known_shape(weights))

        def by_query(values: ir.Value) -> ir.Value:
            """[B or 1, Hq, T or 1] -> [.., Hkv, (G,) .., 1]."""
            batch, _, num_tokens = known_shape(values)
            return b.reshape(values, (batch, *(self.num_kv_heads, self.group)[: rank - 3], num_tokens, 1))

        if self.affine_scale is not None:
            weights = b.op("Mul", [weights, by_query(self.affine_scale)])
        if self.affine_bias is not None:
            weights = b.op("Add", [weights, b.op("Mul", [by_query(self.affine_bias), share()])])
        return weights

    def shared_out(self, b: Builder, seen: ir.Value, t: ir.Value) -> ir.Value:
        """1 / n where an entry is seen, 0 elsewhere: n = min(t + 1, C) tokens are, from the one at t.

        seen: bool [B, 1, .., n entries]. t: int64 of a shape that broadcasts with it. Returns: the shape of seen.
        """
        dtype = self.q.dtype or ir.DataType.FLOAT
        capacity = b.ints(self.num_sinks + self.window_size, "capacity")
        count = b.op("Min", [b.op("Add", [t, b.ints(1, "one")]), capacity])
        one_share = b.op("Reciprocal", [b.cast(count, ir.DataType.FLOAT)])
        return b.op("Where", [seen, b.cast(one_share, dtype), b.scalar(0.0, dtype)], known_shape(seen), dtype)

    def received_before(self, mass: ir.Value) -> ir.Value:
        """[B, Hq, W] of attention_mass [B, Hq, 2, W]: what slots had received after the token before the first."""

        def build(b: Builder) -> ir.Value:
            t = b.reshape(self.position, (self.batch, 1, 1, 1))
            return b.op("Equal", [b.op("Mod", [t, b.ints(2, "two")]), b.ints(1, "one")])

        b, half = self.b, (self.batch, self.num_q_heads, 1, self.window_size)
        chosen = b.op("Where", [self.once("is odd", build), *b.split(mass, (1, 1), 2)], half, FLOAT)
        return b.reshape(chosen, (*half[:2], self.window_size))

    def received_after(self, mass: ir.Value, received: ir.Value, last: Callable[[Builder], ir.Value]) -> ir.Value:
        """attention_mass with received [B, Hq, W] after the last token; last: makes its position, int64 [B].

        The state is read element by element, after all else that reads it: one buffer for both is safe.
        """

        def build(b: Builder) -> ir.Value:
            t = b.op("Mod", [b.reshape(last(b), (self.batch, 1, 1, 1)), b.ints(2, "two")])
            return b.op("Equal", [b.ints(np.arange(2).reshape(1, 1, 2, 1), "halves"), t])

        half = (self.batch, self.num_q_heads, 1, self.window_size)
        operands = [self.once("half", build), self.b.reshape(received, half), mass]
        return self.b.op("Where", operands, known_shape(mass), FLOAT)

    def calibrated(
        self, sinks: ir.Value, window: ir.Value, mass: ir.Value, share: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Weights with later sinks scaled down (`model.attention`), float32 as all that they are made of.

        sinks: [B, Hkv, (G,) T, S]. window: [.., n], of all other entries. mass: [.., T, n], what each of them has
        received, its weight here included. share: [B, 1, .., T, n], see `share`. Returns: sinks and window.
        """
        b, beta = self.b, self.node.attributes["act_beta"].as_float()
        if self.calibrated_heads is None or not self.num_sinks:
            raise ValueError(f"'{self.node.name}': attention_mass without calibrated, or without a sink")
        one = b.scalar(1.0, FLOAT)
        heads = self._by_head(b, self.calibrated_heads, len(known_shape(window)))
        degree = b.op("Max", [b.op("Sub", [b.op("Mul", [mass, share]), one]), b.scalar(0.0, FLOAT)])
        taken = b.op("Mul", [b.op("Min", [degree, heads]), window])
        rest = b.op("Sub", [window, taken])
        others = b.op("Add", [self._total(sinks), self._total(rest)])
        freed = b.op("Mul", [self._total(taken), b.scalar(1.0 - beta, FLOAT)])
        more = b.op("Add", [one, b.op("Div", [freed, b.op("Max", [others, b.scalar(TINY, FLOAT)])])])
        kept = b.op("Mul", [taken, b.scalar(beta, FLOAT)])
        return b.op("Mul", [sinks, more]), b.op("Add", [b.op("Mul", [rest, more]), kept])

    def share(self, b: Builder, t: ir.Value, distance: ir.Value) -> ir.Value:
        """float32, what a mean attention of alpha times the fair share is 1 by: mass * share = mean / (alpha / n).

        t: int64, of the query. distance: int64, of an entry, any if it is not seen; they broadcast. 0 where an entry
        has had fewer than the queries it takes.
        """
        alpha, least = (self.node.attributes[name] for name in ("act_alpha", "act_min_queries"))
        one = b.ints(1, "one")
        queries = b.op("Max", [b.op("Add", [distance, one]), one])
        cached = b.op("Min", [b.op("Add", [t, one]), b.ints(self.num_sinks + self.window_size, "capacity")])
        fair = b.op("Mul", [b.cast(queries, FLOAT), b.scalar(alpha.as_float(), FLOAT)])
        share = b.op("Div", [b.cast(cached, FLOAT), fair])
        enough = b.op("GreaterOrEqual", [queries, b.ints(least.as_int(), "min_queries")])
        return b.op("Where", [enough, share, b.scalar(0.0, FLOAT)], known_shape(share), FLOAT)

    def _total(self, weights: ir.Value) -> ir.Value:
        """[.., n] -> [.., 1]."""
        b = self.b
        return b.op("ReduceSum", [weights, b.ints([-1], "axes")], (*known_shape(weights)[:-1], 1), keepdims=1)

    def _by_head(self, b: Builder, values: ir.Value, rank: int) -> ir.Value:
        """[Hq] -> [1, Hkv, (G,) 1, 1] of a rank of 4 (G = 1) or 5."""
        heads = (self.num_kv_heads, self.group)[: rank - 3]
        return b.reshape(values, (1, *heads, 1, 1))

    def replace_node(
        self, out: ir.Value, sinks: Sequence[ir.Value], window: Sequence[ir.Value], mass: ir.Value | None = None
    ) -> None:
        """Put the collected nodes in the node's place. sinks: two states or none. window: two, with scales four."""
        outputs = [out, *(sinks or (None, None)), *window, *[None] * (4 - len(window)), mass]
        if self.latent_dim:
            outputs[0], outputs[2], outputs[4] = self.b.split(out, self.row_parts, -1)[1], None, None
        replace_node(self.node, self.b.nodes, outputs[: len(self.node.outputs)])

    def softcapped(self, logits: ir.Value) -> ir.Value:
        """``cap * tanh(logits / cap)`` if there is a cap."""
        cap = self.node.attributes["softcap"].as_float()
        if not cap:
            return logits
        b = self.b
        squashed = b.op("Tanh", [b.op("Mul", [logits, b.scalar(1.0 / cap, logits.dtype)])])
        return b.op("Mul", [squashed, b.scalar(cap, logits.dtype)])
