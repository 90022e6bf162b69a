"""The float64 oracle of SinkAttention: the definition of correct, in the plainest words.

It keeps every token of every stream unrotated and, at each step, picks the first S and the last W of them, rotates
keys and query by their place in that list, and attends (StreamingLLM, arXiv:2309.17453). No ring, no stored
rotation, no shift: nothing that the code under test could get wrong in the same way. Slow on purpose.

Only the order of the cached tokens matters, so a stream that is at position 2^33 is checked by feeding its sinks
and then its last W (or more) tokens.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclasses.dataclass
class Token:
    """What attention knows of one token. k: [Hkv, D], not rotated; v: [Hkv, Dv]."""

    k: Array
    v: Array


class SinkAttentionOracle:
    """Attention of one layer over an unbounded list of tokens, for `batch` independent streams.

    num_sink_tokens: S >= 0. window_size: W >= 1.
    inv_freq: [R/2], radians a token; R <= D leading dimensions of a head turn (empty: no positions).
    interleaved: pairs are neighbours (2i, 2i+1); otherwise (i, i + R/2).
    attention_scaling: factor on cos and sin (YaRN, arXiv:2309.00071).
    scale: factor on q . k; None for D ** -0.5.
    softcap: 0 for none, else logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv:2408.00118).
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
    ) -> None:
        self.num_sink_tokens = num_sink_tokens
        self.window_size = window_size
        self.inv_freq = np.asarray(inv_freq, dtype=np.float64)
        self.interleaved = interleaved
        self.attention_scaling = attention_scaling
        self.scale = scale
        self.softcap = softcap
        self.streams: list[list[Token]] = [[] for _ in range(batch)]

    def step(self, q: npt.ArrayLike, k: npt.ArrayLike, v: npt.ArrayLike) -> Array:
        """Add one token to every stream and attend from it.

        q: [B, Hq, D], k: [B, Hkv, D], v: [B, Hkv, Dv], not rotated. Returns [B, Hq, Dv].
        """
        q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
        return np.stack([self.step_stream(b, q[b], k[b], v[b]) for b in range(len(self.streams))])

    def step_stream(self, stream: int, q: npt.ArrayLike, k: npt.ArrayLike, v: npt.ArrayLike) -> Array:
        """The same for one stream, so that streams can be at different positions. Returns [Hq, Dv]."""
        q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
        tokens = self.streams[stream]
        tokens.append(Token(k, v))
        cached = self.cached(tokens)
        keys = np.stack([self.rotated(token.k, j) for j, token in enumerate(cached)])  # [n, Hkv, D]
        values = np.stack([token.v for token in cached])  # [n, Hkv, Dv]
        q = self.rotated(q, len(cached) - 1)
        group = q.shape[0] // keys.shape[1]  # query heads that share a key head
        return np.stack([self.attend(head, keys[:, h // group], values[:, h // group]) for h, head in enumerate(q)])

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

    def attend(self, q: Array, keys: Array, values: Array) -> Array:
        """Softmax attention of one query head: q [D], keys [n, D], values [n, Dv] -> [Dv]."""
        scale = q.shape[0] ** -0.5 if self.scale is None else self.scale
        logits = keys @ q * scale  # [n]
        if self.softcap:
            logits = self.softcap * np.tanh(logits / self.softcap)
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        out: Array = weights @ values
        return out
