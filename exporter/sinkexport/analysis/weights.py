"""Attention weights of one context, summed by the token that receives them, a layer and a block at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sinkrt.errors import UsageError, problem

from sinkexport.families.interface import IGNORED_ARGUMENTS, intercept_attention

Array = npt.NDArray[np.float64]

NEAR_TOKENS = 32
"""Tokens before a query that are near: every head looks there, so it does not count as looking from afar."""

QUERIES_AT_ONCE = 256
WeightsOf = Callable[[torch.Tensor, torch.Tensor, int, int, dict[str, Any]], torch.Tensor]
"""q, k, start, stop and the arguments of attention -> weights float32 [Hq, stop - start, stop]."""
"""Rows of attention weights in memory at a time, for each head of one layer."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """Attention that the tokens of one context of T tokens receive, in L layers of Hq query heads.

    received: [L, Hq, T], alpha_k: mean weight of token k over the queries i >= k (arXiv:2410.10781).
    from_afar: [L, Hq, T], mean over the queries i >= k + NEAR_TOKENS that the layer lets see token k; 0 without any.
    fair_share: [L, T], what `from_afar` would be if every query looked at all tokens it sees alike.
    late: [L, Hq, K], mean weight of the first K tokens over the queries i >= T / 2.
    base: mean over the same queries of the weight of one token that is neither near nor among the first K.
    key_norm, value_norm: [L, T], Euclidean norms, mean over the key heads, over the median of the tokens from K on.
    likeness: [L, T], cosine of a token's values, all heads in one vector, with those of token 0.
    sliding_windows: [L], of each layer; None: it has none.
    change: [L, Hq, n], how much a head's output changes if it sees only the first K tokens and the last `distances`
    [n]: mean Euclidean distance over the queries i >= T / 2, over the root mean square of the outputs of the layer's
    heads. (The attention that a head pays to tokens it would not see says little: they may contribute nothing.)
    num_kv_heads: Hkv.
    """

    received: Array
    from_afar: Array
    fair_share: Array
    late: Array
    base: float
    key_norm: Array
    value_norm: Array
    likeness: Array
    sliding_windows: tuple[int | None, ...]
    change: Array
    distances: tuple[int, ...]
    num_kv_heads: int

    @property
    def sliding_window(self) -> int | None:
        """The smallest sliding window of the layers."""
        return min((size for size in self.sliding_windows if size is not None), default=None)


def attention_weights(
    model: Any,
    ids: Sequence[int],
    num_candidates: int,
    show: Callable[[int], None] = lambda _done: None,
    *,
    queries_at_once: int = QUERIES_AT_ONCE,
    weights_of: WeightsOf | None = None,
) -> Weights:
    """Run `model` over ids [T] as one context and sum its attention.

    show: called with the number of layers done. queries_at_once: number of queries whose weights of one layer, float32
    [Hq, n, T], are in memory at a time. weights_of: computes them; `softmax_weights` by default.

    Raises: UsageError for a model that does not use transformers' attention interface, has layers without attention or
        with more than a softmax, or gives values that are not numbers.
    """
    layers: list[_Layer] = []

    def attend(
        _module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _mask: Any = None, **arguments: Any
    ) -> tuple[torch.Tensor, None]:
        refuse_unknown(arguments, len(layers))
        layer = _Layer(q.shape[1], len(ids), num_candidates, arguments.get("sliding_window"))
        outputs = []
        for start, stop in _blocks(len(ids), queries_at_once):
            weights = (weights_of or softmax_weights)(q, k, start, stop, arguments)  # [Hq, n, stop]
            layer.add(weights, start)
            grouped = weights.to(v.dtype).reshape(v.shape[1], -1, stop)  # [Hkv, G * n, stop]
            outputs.append((grouped @ v[0, :, :stop]).reshape(q.shape[1], stop - start, -1))  # [Hq, n, Dv]
            layer.cut_short(weights, v[0, :, :stop].float(), outputs[-1].float(), start)
        layer.look_at(k[0], v[0])
        layers.append(layer)
        show(len(layers))
        return torch.cat(outputs, dim=1).transpose(0, 1)[None], None  # [1, T, Hq, Dv]

    with torch.no_grad(), intercept_attention(model, attend):
        model(input_ids=torch.tensor([list(ids)]), use_cache=False, logits_to_keep=1)
    num_layers = model.config.get_text_config().num_hidden_layers
    if len(layers) != num_layers:
        raise _refused(f"softmax attention in {len(layers)} of {num_layers} layers", "it in every layer")
    weights = Weights(
        received=np.stack([layer.received for layer in layers]),
        from_afar=np.stack([layer.from_afar for layer in layers]),
        fair_share=np.stack([layer.fair_share for layer in layers]),
        late=np.stack([layer.late for layer in layers]),
        base=float(np.mean([layer.base for layer in layers])),
        key_norm=np.stack([layer.key_norm for layer in layers]),
        value_norm=np.stack([layer.value_norm for layer in layers]),
        likeness=np.stack([layer.likeness for layer in layers]),
        sliding_windows=tuple(layer.sliding_window or None for layer in layers),
        change=np.stack([layer.change for layer in layers]),
        distances=layers[0].distances,
        num_kv_heads=layers[0].num_kv_heads,
    )
    if not np.isfinite(weights.received).all() or not np.isfinite(weights.value_norm).all():
        raise _refused("attention that is not a number", "finite weights")
    return weights


def softmax_weights(q: torch.Tensor, k: torch.Tensor, start: int, stop: int, arguments: dict[str, Any]) -> torch.Tensor:
    """Compute attention weights of the queries from `start` to `stop` as the model does.

    q: [1, Hq, T, D], k: [1, Hkv, T, D], rotated. arguments: what the model passes to its attention function.
    Returns: float32 [Hq, stop - start, stop].
    """
    scaling, softcap, sliding_window = (arguments.get(name) for name in _ARGUMENTS)
    num_q_heads, num_kv_heads, count = q.shape[1], k.shape[1], stop - start
    # Scaled before the matmul, masked in place and only where it matters: [Hq, n, stop] takes the time.
    queries = q[0, :, start:stop].float() * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    logits = queries.reshape(num_kv_heads, -1, q.shape[-1]) @ k[0, :, :stop].float().mT  # [Hkv, G * n, stop]
    logits = logits.reshape(num_q_heads, count, stop)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    behind = torch.arange(count)[:, None] - torch.arange(count)  # [n, n], tokens from key to query
    logits[:, :, start:].masked_fill_(behind < 0, float("-inf"))
    if sliding_window:
        behind = torch.arange(start, stop)[:, None] - torch.arange(stop)  # [n, stop]
        logits.masked_fill_(behind >= sliding_window, float("-inf"))
    return logits.softmax(dim=-1)


_ARGUMENTS = ("scaling", "softcap", "sliding_window")


def _blocks(size: int, queries_at_once: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of blocks of queries; none has queries of both halves of the context."""
    for first, last in ((0, size // 2), (size // 2, size)):
        for start in range(first, last, queries_at_once):
            yield start, min(start + queries_at_once, last)


class _Layer:
    """Sums of one layer's weights, float64 [Hq, T] by receiving token, and means of them."""

    def __init__(self, heads: int, size: int, num_candidates: int, sliding_window: int | None) -> None:
        self.sliding_window = sliding_window
        self._size, self._half, self._num_candidates = size, size // 2, num_candidates
        self._all, self._far = (torch.zeros(heads, size, dtype=torch.float64) for _ in range(2))
        self._late = torch.zeros(heads, num_candidates, dtype=torch.float64)
        # Powers of two that some late query has so many tokens behind it.
        self.distances = tuple(NEAR_TOKENS << i for i in range(20) if NEAR_TOKENS << i <= size // 2)
        self._change = torch.zeros(heads, len(self.distances), dtype=torch.float64)
        self._output = 0.0  # sum of squares, in late queries
        self._other = 0.0  # weight of tokens that are neither near nor among the first, in late queries

    def add(self, weights: torch.Tensor, start: int) -> None:
        """Add the queries from `start` to `stop`. weights: [Hq, n, stop]."""
        stop = weights.shape[2]
        total = weights.sum(dim=1).double()  # [Hq, stop]
        # Keys before `edge` are far from all queries of the block: only the rest needs a mask.
        edge = max(0, start - NEAR_TOKENS + 1)
        is_far = torch.arange(start, stop)[:, None] - torch.arange(edge, stop) >= NEAR_TOKENS  # [n, stop - edge]
        far = torch.cat((total[:, :edge], (weights[:, :, edge:] * is_far).sum(dim=1).double()), dim=1)
        self._all[:, :stop] += total
        self._far[:, :stop] += far
        if start >= self._half:
            self._late += total[:, : self._num_candidates]
            self._other += float(far[:, self._num_candidates :].sum())

    def cut_short(self, weights: torch.Tensor, v: torch.Tensor, out: torch.Tensor, start: int) -> None:
        """Compare outputs with those of shorter windows.

        weights: [Hq, n, stop] of the queries from `start` on. v: [Hkv, stop, Dv]. out: weights times v.
        """
        if start < self._half:
            return
        heads, count, stop = weights.shape
        self._output += float(out.double().square().sum())
        key = torch.arange(stop)
        for i, distance in enumerate(self.distances):
            # A window of that many tokens holds the query's own.
            kept = (torch.arange(start, stop)[:, None] - key < distance) | (key < self._num_candidates)
            near = weights * kept  # [Hq, n, stop]
            near /= near.sum(dim=-1, keepdim=True)
            cut = (near.reshape(v.shape[0], -1, stop) @ v).reshape(heads, count, -1)
            self._change[:, i] += (out - cut).norm(dim=-1).sum(dim=1)

    def look_at(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Measure norms and directions of the keys k and values v [Hkv, T, .]."""
        self.num_kv_heads = k.shape[0]
        self.key_norm, self.value_norm = (_relative_norms(x.float(), self._num_candidates) for x in (k, v))
        flat = v.float().transpose(0, 1).flatten(1)  # [T, Hkv * Dv]
        self.likeness: Array = torch.cosine_similarity(flat, flat[:1], dim=-1).double().numpy()

    @property
    def received(self) -> Array:
        return np.asarray(self._all) / np.arange(self._size, 0, -1)  # T - k queries i >= k

    @property
    def from_afar(self) -> Array:
        first, last = self._far_queries()
        return np.asarray(self._far) / np.maximum(last - first, 1)

    @property
    def fair_share(self) -> Array:
        first, last = self._far_queries()
        seen = np.arange(1, self._size + 1)  # tokens that query i sees
        shares = 1 / (seen if not self.sliding_window else np.minimum(seen, self.sliding_window))
        before = np.concatenate(([0.0], np.cumsum(shares)))  # sum over the queries before i
        fair: Array = (before[last] - before[first]) / np.maximum(last - first, 1)
        return fair

    @property
    def late(self) -> Array:
        return np.asarray(self._late) / (self._size - self._half)

    @property
    def change(self) -> Array:
        num_queries, heads = self._size - self._half, len(self._change)
        typical = (self._output / (num_queries * heads)) ** 0.5
        return np.asarray(self._change) / (num_queries * max(typical, 1e-12))

    @property
    def base(self) -> float:
        queries = np.arange(self._half, self._size)
        others = np.maximum(queries - NEAR_TOKENS + 1 - self._num_candidates, 0).sum()
        return self._other / (self._all.shape[0] * max(int(others), 1))

    def _far_queries(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Find the first query that sees token k from afar and the one after the last, [T] each; equal: none."""
        key = np.arange(self._size)
        first = np.minimum(key + NEAR_TOKENS, self._size)
        end = np.full(self._size, self._size)
        last = np.minimum(key + self.sliding_window, end) if self.sliding_window else end
        return first, np.maximum(first, last)


def _relative_norms(x: torch.Tensor, num_candidates: int) -> Array:
    """Compute norms over their median from `num_candidates` on. x: [H, T, D]. Returns: [T]."""
    norms = x.norm(dim=-1).mean(dim=0)  # [T]
    relative: Array = (norms / norms[num_candidates:].median().clamp(min=1e-12)).double().numpy()
    return relative


def refuse_unknown(arguments: dict[str, Any], layer: int) -> None:
    """Refuse attention that does more than `softmax_weights` computes.

    Raises: UsageError.
    """
    for name, value in sorted(arguments.items()):
        if value is not None and name not in _ARGUMENTS and name not in IGNORED_ARGUMENTS:
            raise _refused(f"the attention argument '{name}' in layer {layer}", "plain softmax attention")


def _refused(received: str, expected: str) -> UsageError:
    return UsageError(problem("model", received=received, expected=expected, fix="this model cannot be analyzed"))
