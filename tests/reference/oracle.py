"""The float64 oracle of SinkAttention: the definition of correct, in the plainest words.

It keeps every token of every stream unrotated. Each step picks the first S and the last W of them, rotates keys and
query by their place in that list, and attends (StreamingLLM, arXiv:2309.17453). No ring, no stored rotation, no
shift: nothing that the code under test could get wrong in the same way. Slow on purpose.

With kv="fp16" or "int8" each token is rounded once, its key as it is at its stream position, and takes part as its
rounded self for as long as it is in the window. Sinks are not rounded. A key's place in the list then no longer says
how it was rounded, so the query is rotated to its stream position for the window's keys.

Only the order of the cached tokens matters, so a stream that is at position 2^33 is checked by feeding its sinks
and then its last W (or more) tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclasses.dataclass
class Int8Row:
    """One token's key or value. entries: integers [Hkv, D]; scale: [Hkv], numbers that float16 can represent."""

    entries: Array
    scale: Array

    @classmethod
    def of(cls, x: Array) -> Int8Row:
        """scale = float16(max|x| / 127) within 2^-17 .. 65504; entries = x / scale, halves to even, -127 .. 127."""
        scale = np.clip(np.abs(x).max(axis=-1) / 127, 2.0**-17, 65504.0).astype(np.float16).astype(np.float64)
        return cls(np.clip(np.rint(x / scale[:, None]), -127, 127), scale)

    @property
    def values(self) -> Array:
        """[Hkv, D]."""
        return self.entries * self.scale[:, None]


@dataclasses.dataclass
class HalfRow:
    """One token's key or value [Hkv, D], rounded to float16 by way of float32, which is what is ever stored."""

    values: Array

    @classmethod
    def of(cls, x: Array) -> HalfRow:
        return cls(x.astype(np.float32).astype(np.float16).astype(np.float64))


@dataclasses.dataclass
class LatentRow:
    """One token's key of latent attention, [1, R + L]: what turns, and what is the value."""

    rotary: Int8Row
    latent: Int8Row

    @property
    def values(self) -> Array:
        """[1, R + L]."""
        return np.concatenate((self.rotary.values, self.latent.values), axis=1)


@dataclasses.dataclass
class Token:
    """What attention knows of one token. k: [Hkv, D], not rotated; v: [Hkv, Dv].

    k_in_window, v_in_window: with kv="fp16" and "int8", key at its stream position and value as the window holds them.
    received: with act, by query head, the softmax weights that it got while it was cached, its own query's first.
    """

    k: Array
    v: Array
    k_in_window: HalfRow | Int8Row | LatentRow | None = None
    v_in_window: HalfRow | Int8Row | None = None
    received: dict[int, list[float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Act:
    """Calibration of later sinks (ACT, arXiv:2406.15765), decided at every query by what was received until then.

    A cached token that is none of the first S, and has been seen by min_queries queries or more, is a sink to the
    degree d = (m n / alpha) - 1 within 0 .. 1: m is the mean weight that it got from the queries that saw it, this one
    included, and n the number of cached tokens. Its weight a is beta d a + (1 - d) a (1 + F / R): what all sinks lose,
    F = (1 - beta) sum(d a), goes to the others in proportion, R = sum((1 - d) a).
    heads: [Hq], which ones are calibrated.
    """

    alpha: float
    beta: float
    min_queries: int
    heads: Sequence[bool]


class SinkAttentionOracle:
    """Attention of one layer over an unbounded list of tokens, for `batch` independent streams.

    num_sink_tokens: S >= 0. window_size: W >= 1.
    inv_freq: [R/2], radians a token; R <= D leading dimensions of a head turn (empty: no positions).
    interleaved: pairs are neighbours (2i, 2i+1); otherwise (i, i + R/2).
    attention_scaling: factor on cos and sin (YaRN, arXiv:2309.00071).
    scale: factor on q . k; None for D ** -0.5.
    softcap: 0 for none, else logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv:2408.00118).
    kv: ``fp | fp16 | int8``, how the window holds keys and values.
    alibi_slopes: [Hq]; logits get slope * (place of the key - place of the query), after softcap (arXiv:2108.12409).
    sink_logit: [Hq], one more logit of each softmax, without a value (gpt-oss).
    sink_scale: [Hq], factor on the softmax weight of token 0 before normalising; needs a sink.
    act: calibration of later sinks, of the weights that all that gives; needs a sink.
    is_latent: a value is the last part of its key. Both parts are rounded apart (kv="int8").
    """

    def __init__(
        self,
        *,
        batch: int,
        num_sink_tokens: int,
        window_size: int,
        inv_freq: npt.ArrayLike = (),
        interleaved: bool = False,
        attention_scaling: float = 1.0,
        scale: float | None = None,
        softcap: float = 0.0,
        kv: str = "fp",
        alibi_slopes: npt.ArrayLike | None = None,
        sink_logit: npt.ArrayLike | None = None,
        sink_scale: npt.ArrayLike | None = None,
        act: Act | None = None,
        is_latent: bool = False,
    ) -> None:
        if (sink_scale is not None or act is not None) and num_sink_tokens < 1:
            raise ValueError("sink_scale and act need num_sink_tokens >= 1: token 0 must stay in the cache")
        self.act, self.is_latent = act, is_latent
        self.num_sink_tokens = num_sink_tokens
        self.window_size = window_size
        self.inv_freq = np.asarray(inv_freq, dtype=np.float64)
        self.interleaved = interleaved
        self.attention_scaling = attention_scaling
        self.scale = scale
        self.softcap = softcap
        self.kv = kv
        self.alibi_slopes, self.sink_logit, self.sink_scale = (
            None if x is None else np.asarray(x, dtype=np.float64) for x in (alibi_slopes, sink_logit, sink_scale)
        )
        self.streams: list[list[Token]] = [[] for _ in range(batch)]

    def step(
        self,
        q: npt.ArrayLike,
        k: npt.ArrayLike,
        v: npt.ArrayLike,
        gate: npt.ArrayLike | None = None,
        affine: npt.ArrayLike | None = None,
    ) -> Array:
        """Add one token to every stream and attend from it.

        q: [B, Hq, D], k: [B, Hkv, D], v: [B, Hkv, Dv], not rotated. Returns [B, Hq, Dv].
        gate: [B, Hq, 1] or [B, Hq, Dv], the output is multiplied by its sigmoid.
        affine: [B, Hq, 2], a and b: a softmax weight w becomes a * w + b / (number of cached tokens, the new one
        included), a sink logit's none (arXiv:2602.23057; `affine_factors`).
        """
        q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
        none = [None] * len(self.streams)
        gates, affines = (none if x is None else np.asarray(x, dtype=np.float64) for x in (gate, affine))
        return np.stack([self.step_stream(b, q[b], k[b], v[b], gates[b], affines[b]) for b in range(len(self.streams))])

    def step_stream(
        self,
        stream: int,
        q: npt.ArrayLike,
        k: npt.ArrayLike,
        v: npt.ArrayLike,
        gate: npt.ArrayLike | None = None,
        affine: npt.ArrayLike | None = None,
    ) -> Array:
        """The same for one stream, so that streams can be at different positions. Returns [Hq, Dv]."""
        q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
        tokens = self.streams[stream]
        t = len(tokens)
        tokens.append(Token(k, v))
        if self.kv == "fp16":
            tokens[t].k_in_window, tokens[t].v_in_window = HalfRow.of(self.rotated(k, t)), HalfRow.of(v)
        elif self.kv == "int8":
            turned, of_value = self.rotated(k, t), Int8Row.of(v)
            if self.is_latent:
                tokens[t].k_in_window = LatentRow(Int8Row.of(turned[:, : -v.shape[1]]), of_value)
            else:
                tokens[t].k_in_window = Int8Row.of(turned)
            tokens[t].v_in_window = of_value
        cached = self.cached(tokens)
        # Of each cached token its key, the query as it meets this key, and its value:
        # [n, Hkv, D], [n, Hq, D], [n, Hkv, D].
        met = [self.met(token, j, q, t, len(cached) - 1) for j, token in enumerate(cached)]
        keys, queries, values = (np.stack(x) for x in zip(*met, strict=True))
        group = q.shape[0] // keys.shape[1]  # query heads that share a key head
        pairs = np.tile((1.0, 0.0), (q.shape[0], 1)) if affine is None else np.asarray(affine, dtype=np.float64)
        out = np.stack(
            [
                self.attend(h, queries[:, h], keys[:, h // group], values[:, h // group], pairs[h], cached)
                for h in range(q.shape[0])
            ]
        )
        return out if gate is None else out / (1 + np.exp(-np.asarray(gate, dtype=np.float64)))

    def met(self, token: Token, place: int, q: Array, t: int, last_place: int) -> tuple[Array, Array, Array]:
        """Key [Hkv, D], query [Hq, D] and value [Hkv, D] of one cached token; place: its own, t: the query's."""
        if token.k_in_window is None or token.v_in_window is None or place < self.num_sink_tokens:
            return self.rotated(token.k, place), self.rotated(q, last_place), token.v
        return token.k_in_window.values, self.rotated(q, t), token.v_in_window.values

    def cached(self, tokens: list[Token]) -> list[Token]:
        """The first S tokens and the last W of the others, oldest first."""
        sinks, others = tokens[: self.num_sink_tokens], tokens[self.num_sink_tokens :]
        return sinks + others[-self.window_size :]

    def rotated(self, x: Array, position: int) -> Array:
        """Rotary embedding of x [heads, D] at one in-cache position (RoFormer, arXiv:2104.09864)."""
        half = len(self.inv_freq)
        out = x.copy()
        for i in range(half):
            first, second = (2 * i, 2 * i + 1) if self.interleaved else (i, i + half)
            angle = position * self.inv_freq[i]
            cos, sin = self.attention_scaling * np.cos(angle), self.attention_scaling * np.sin(angle)
            out[:, first] = x[:, first] * cos - x[:, second] * sin
            out[:, second] = x[:, second] * cos + x[:, first] * sin
        return out

    def attend(
        self, head: int, queries: Array, keys: Array, values: Array, affine: Array, cached: list[Token]
    ) -> Array:
        """Softmax attention of one query head: queries [n, D], keys [n, D], values [n, Dv], oldest first -> [Dv].

        affine: [2], scale of the weights, and what is added to all of them together. cached: the n tokens.
        """
        scale = keys.shape[1] ** -0.5 if self.scale is None else self.scale
        logits = (queries * keys).sum(axis=1) * scale  # [n]
        if self.softcap:
            logits = self.softcap * np.tanh(logits / self.softcap)
        if self.alibi_slopes is not None:
            logits = logits + self.alibi_slopes[head] * (np.arange(len(logits)) - (len(logits) - 1))
        largest = logits.max() if self.sink_logit is None else max(logits.max(), self.sink_logit[head])
        weights = np.exp(logits - largest)
        if self.sink_scale is not None:
            weights[0] *= self.sink_scale[head]  # the oldest cached token is token 0: there is a sink
        weights /= weights.sum() + (0.0 if self.sink_logit is None else np.exp(self.sink_logit[head] - largest))
        if self.act is not None:
            weights = self.calibrated(self.act, head, weights, cached)
        weights = affine[0] * weights + affine[1] / len(weights)
        out: Array = weights @ values
        return out

    def calibrated(self, act: Act, head: int, weights: Array, cached: list[Token]) -> Array:
        """weights: [n], of one query head, oldest first."""
        degree = np.zeros(len(cached))
        for i, token in enumerate(cached):
            received = token.received.setdefault(head, [])
            received.append(float(weights[i]))
            if i >= self.num_sink_tokens and len(received) >= act.min_queries and act.heads[head]:
                degree[i] = np.clip(np.mean(received) * len(cached) / act.alpha - 1, 0, 1)
        sinks, others = degree * weights, (1 - degree) * weights
        return act.beta * sinks + others * (1 + (1 - act.beta) * sinks.sum() / others.sum())


def affine_factors(
    x: npt.ArrayLike,
    *,
    scale_weight: npt.ArrayLike | None = None,
    scale_bias: npt.ArrayLike | None = None,
    scale_average: npt.ArrayLike | None = None,
    bias_weight: npt.ArrayLike | None = None,
    bias_bias: npt.ArrayLike | None = None,
    activation: str = "linear",
    num_q_heads: int,
) -> Array:
    """Scale and bias of affine-scaled attention (arXiv:2602.23057) for one token's hidden state x [N]: [Hq, 2].

    a = activation(scale_weight x + scale_bias); b = bias_weight x + bias_bias, or scale_average - a if that is given.
    weights: [Hq, N], absent ones are 0. biases, average: [Hq]. An absent scale_bias is 1 if the activation is
    ``linear`` and 0 otherwise, an absent bias_bias is 0. Without scale_weight and scale_bias a = 1.
    """
    x = np.asarray(x, dtype=np.float64)

    def projected(weight: npt.ArrayLike | None, bias: npt.ArrayLike | None, absent: float) -> Array:
        out = np.full(num_q_heads, absent) if bias is None else np.asarray(bias, dtype=np.float64)
        return out if weight is None else out + np.asarray(weight, dtype=np.float64) @ x

    a = projected(scale_weight, scale_bias, 1.0 if activation == "linear" else 0.0)
    if scale_weight is None and scale_bias is None:
        a = np.ones(num_q_heads)
    elif activation == "sigmoid":
        a = 1 / (1 + np.exp(-a))
    elif activation == "clip":
        a = np.clip(a, 0, 1)
    b = projected(bias_weight, bias_bias, 0.0)
    return np.stack((a, b if scale_average is None else np.asarray(scale_average, dtype=np.float64) - a), axis=1)
