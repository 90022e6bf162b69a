"""Where a model's attention sinks are, and how many first tokens to keep.

Windows of a text run through the model, each as a context of its own, and every layer's attention weights are summed up
by the token that receives them. Three questions:

* How much attention do the first tokens draw from queries far behind them? (StreamingLLM, arXiv:2309.17453)
* In how many heads is token k a sink? alpha_k is the mean weight that token k receives from the queries i >= k, and a
  head has a sink at k if alpha_k > epsilon = 0.3 ("When Attention Sink Emerges in Language Models", arXiv:2410.10781).
* Do later tokens draw attention from afar as well: secondary sinks? ("On the Existence and Behaviour of Secondary
  Attention Sinks"). They leave a sliding window in time, and are listed with the layers and heads that look at them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sinkrt.errors import UsageError, problem

from sinkexport.model.decoder import IGNORED_ARGUMENTS
from sinkexport.model.interface import intercept_attention
from sinkexport.progress import Report, silent
from sinkexport.sources import LoadedModel

Array = npt.NDArray[np.float64]

EPSILON = 0.3
"""Mean weight above which arXiv:2410.10781 calls a token a sink of a head."""

NEAR_TOKENS = 32
"""A query's own neighbourhood: every head looks there, sink or not, so it does not count as looking from afar."""

SECONDARY_WEIGHT = 0.05
"""Mean weight from afar that makes a later token a secondary sink of a head: 1 in 20, and far above 1 / T."""

COVERAGE = 0.99
"""Share of the first tokens' excess attention that the recommended sinks must draw."""

QUERIES_AT_ONCE = 256
"""Rows of attention weights that exist at a time, in each head of one layer."""


@dataclasses.dataclass(frozen=True)
class SecondarySink:
    """A later token that heads look at from afar.

    token_id, text: of the token. times: how often it is one. windows: in how many windows. positions: where in them,
    the first ones only.
    layers: those with such a head. heads: how many (layer, head) pairs, at most, in a window. weight: the largest mean
    weight from afar.
    """

    token_id: int
    text: str
    times: int
    windows: int
    positions: tuple[int, ...]
    layers: tuple[int, ...]
    heads: int
    weight: float


@dataclasses.dataclass(frozen=True)
class SinkReport:
    """What `analyze` found. K candidates, T tokens a window.

    mass: [layers][heads][K], mean weight of the first K tokens in queries of a window's second half.
    base: mean weight of one token that is neither among the first K nor near, in the same queries.
    sink_share: [K], share of all heads with alpha_k > epsilon. value_norm: [layers], norm of the first token's value
    over the median of the others': sinks carry little (arXiv:2410.10781).
    recommended: S. reason: in words.
    """

    model: str
    num_windows: int
    window_tokens: int
    num_candidates: int
    mass: tuple[tuple[tuple[float, ...], ...], ...]
    base: float
    sink_share: tuple[float, ...]
    value_norm: tuple[float, ...]
    secondary: tuple[SecondarySink, ...]
    recommended: int
    reason: str

    @property
    def mass_by_position(self) -> Array:
        """[K]: mean over layers and heads."""
        mean: Array = np.array(self.mass).mean(axis=(0, 1))
        return mean

    def to_json(self) -> str:
        """All figures."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def analyze(
    loaded: LoadedModel,
    ids: Sequence[int],
    *,
    num_windows: int = 8,
    window_tokens: int = 1024,
    num_candidates: int = 16,
    report: Report = silent,
) -> SinkReport:
    """Measure attention over the first `num_windows` windows of `window_tokens` tokens of a text.

    Memory does not depend on the length of the text. report: told of the stage ``windows``.

    Raises: UsageError for numbers out of range, a text that is too short, or a model that does not use transformers'
    attention interface or whose attention is more than a softmax.
    """
    _check(num_windows, window_tokens, num_candidates)
    if len(ids) < num_windows * window_tokens:
        raise UsageError(
            problem("text", received=f"{len(ids)} tokens", expected=f"{num_windows} windows of {window_tokens} tokens",
                    fix="use a longer text, or fewer or shorter windows")
        )  # fmt: skip
    model = loaded.model
    num_layers = model.config.get_text_config().num_hidden_layers
    windows = [list(ids[i * window_tokens : (i + 1) * window_tokens]) for i in range(num_windows)]
    totals: list[Weights] = []
    found: dict[int, list[_Seen]] = {}
    for number, window in enumerate(windows):
        report("windows", number, num_windows)
        weights = attention_weights(model, window, num_layers, num_candidates)
        totals.append(weights)
        for seen in _secondary(weights, number, window, num_candidates):
            found.setdefault(seen.token_id, []).append(seen)
    report("windows", num_windows, num_windows)
    mass = np.mean([w.late for w in totals], axis=0)  # [layers, heads, K]
    alpha = np.mean([w.received[:, :, :num_candidates] for w in totals], axis=0)  # [layers, heads, K]
    base = float(np.mean([w.base for w in totals]))
    recommended, reason = recommend(mass.mean(axis=(0, 1)), base)
    return SinkReport(
        model=loaded.name,
        num_windows=num_windows,
        window_tokens=window_tokens,
        num_candidates=num_candidates,
        mass=tuple(tuple(tuple(map(float, head)) for head in layer) for layer in mass),
        base=base,
        sink_share=tuple(float((alpha[:, :, k] > EPSILON).mean()) for k in range(num_candidates)),
        value_norm=tuple(map(float, np.mean([w.value_norm for w in totals], axis=0))),
        secondary=_summed_up(found, loaded.tokenizer),
        recommended=recommended,
        reason=reason,
    )


@dataclasses.dataclass(frozen=True)
class Weights:
    """Attention weights of one window, by the token that receives them.

    received: [layers, heads, T], alpha_k, mean over the queries i >= k. from_afar: [layers, heads, T], mean over the
    queries i >= k + NEAR_TOKENS (0 if there is none). late: [layers, heads, K], mean over the queries i >= T / 2.
    base: mean over the same queries of the weight of one token that is neither near nor among the first K.
    value_norm: [layers].
    """

    received: Array
    from_afar: Array
    late: Array
    base: float
    value_norm: Array


def attention_weights(model: Any, window: Sequence[int], num_layers: int, num_candidates: int) -> Weights:
    """Run one window, ids [T], and sum its attention weights up, a layer and `QUERIES_AT_ONCE` queries at a time.

    Raises: UsageError.
    """
    size, half = len(window), len(window) // 2
    received: list[Array] = [np.zeros(0)] * num_layers
    from_afar: list[Array] = [np.zeros(0)] * num_layers
    late: list[Array] = [np.zeros(0)] * num_layers
    base: list[float] = [0.0] * num_layers
    value_norm: list[float] = [0.0] * num_layers

    def attend(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _mask: Any = None, **arguments: Any
    ) -> tuple[torch.Tensor, None]:
        layer = int(module.layer_idx)
        sums = _Sums(q.shape[1], size, num_candidates)
        out = torch.empty_like(q)  # [1, Hq, T, Dv]
        for start in range(0, size, QUERIES_AT_ONCE):
            weights = _softmax(q, k, start, layer, arguments)  # [Hq, n, T]
            sums.add(weights, start)
            group = q.shape[1] // v.shape[1]
            out[0, :, start : start + weights.shape[1]] = weights.to(v.dtype) @ v[0].repeat_interleave(group, dim=0)
        queries = torch.arange(size, 0, -1, dtype=torch.float64)  # that look at token k: T - k
        received[layer] = (sums.all / queries).numpy()
        from_afar[layer] = (sums.far / (queries - NEAR_TOKENS).clamp(min=1)).numpy()
        late[layer] = (sums.late[:, :num_candidates] / (size - half)).numpy()
        base[layer] = float(sums.other / (q.shape[1] * sums.num_others))
        norms = v[0].float().norm(dim=-1).mean(dim=0)  # [T]
        value_norm[layer] = float(norms[0] / norms[1:].median().clamp(min=1e-12))
        return out.transpose(1, 2), None

    ids = torch.tensor([list(window)])
    with torch.no_grad(), intercept_attention(model, attend):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    if any(not layer.size for layer in received):
        raise UsageError(problem("model", received="layers without softmax attention", expected="it in every layer",
                                 fix="this model cannot be analyzed"))  # fmt: skip
    return Weights(
        received=np.stack(received),
        from_afar=np.stack(from_afar),
        late=np.stack(late),
        base=float(np.mean(base)),
        value_norm=np.array(value_norm),
    )


class _Sums:
    """Sums of one layer's weights over queries, float64 [Hq, T] by receiving token."""

    def __init__(self, heads: int, size: int, num_candidates: int) -> None:
        self._size, self._half, self._num_candidates = size, size // 2, num_candidates
        self.all, self.far, self.late = (torch.zeros(heads, size, dtype=torch.float64) for _ in range(3))
        self.other = 0.0  # weight of tokens that are neither near nor among the first, in late queries
        queries = np.arange(self._half, size)
        self.num_others = float(np.maximum(queries - NEAR_TOKENS + 1 - num_candidates, 0).sum()) or 1.0

    def add(self, weights: torch.Tensor, start: int) -> None:
        """weights: [Hq, n, T] of the queries from `start` on."""
        query = torch.arange(start, start + weights.shape[1])[:, None]  # [n, 1]
        far = weights * (query - torch.arange(self._size) >= NEAR_TOKENS)
        self.all += weights.sum(dim=1, dtype=torch.float64)
        self.far += far.sum(dim=1, dtype=torch.float64)
        late = query[:, 0] >= self._half
        self.late += weights[:, late].sum(dim=1, dtype=torch.float64)
        self.other += float(far[:, late, self._num_candidates :].sum(dtype=torch.float64))


def _softmax(q: torch.Tensor, k: torch.Tensor, start: int, layer: int, arguments: dict[str, Any]) -> torch.Tensor:
    """Attention weights float32 [Hq, n, T] of `QUERIES_AT_ONCE` queries from `start` on, as the model defines them.

    q: [1, Hq, T, D], k: [1, Hkv, T, D], rotated.

    Raises: UsageError.
    """
    known = ("scaling", "softcap", "sliding_window")
    unknown = sorted(n for n, x in arguments.items() if x is not None and n not in known and n not in IGNORED_ARGUMENTS)
    if unknown:
        raise UsageError(problem("attention", received=f"the argument '{unknown[0]}' in layer {layer}",
                                 expected="plain softmax attention", fix="this model cannot be analyzed"))  # fmt: skip
    scaling, softcap, own_window = (arguments.get(name) for name in known)
    q = q[0, :, start : start + QUERIES_AT_ONCE].float()
    keys = k[0].float().repeat_interleave(q.shape[0] // k.shape[1], dim=0)
    logits = q @ keys.mT * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    query, key = torch.arange(start, start + q.shape[1])[:, None], torch.arange(keys.shape[1])
    hidden = key > query
    if own_window:
        hidden |= query - key >= own_window
    return logits.masked_fill(hidden, float("-inf")).softmax(dim=-1)


def recommend(mass: Array, base: float) -> tuple[int, str]:
    """How many first tokens to keep, and why.

    mass: [K], mean weight of the first tokens from afar. base: that of any other token.
    What counts is the excess over `base`: a token that draws what every token draws is no sink.
    """
    excess = np.maximum(mass - base, 0)
    total = float(excess.sum())
    if total <= mass.size * base:  # the first K tokens draw less than twice what K others do
        return 0, (f"no sinks: the first {mass.size} tokens draw {mass.sum():.1%} of the attention, "
                   f"{mass.size} others {mass.size * base:.1%}")  # fmt: skip
    needed = int(np.searchsorted(np.cumsum(excess), COVERAGE * total)) + 1
    return needed, (f"the first {needed} draw {float(mass[:needed].sum()):.1%} of all attention from afar, and "
                    f"{float(excess[:needed].sum()) / total:.1%} of what the first {mass.size} draw above the "
                    f"{base:.3%} of any other token")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Seen:
    """A secondary sink in one window."""

    token_id: int
    window: int
    position: int
    layers: tuple[int, ...]
    heads: int
    weight: float


def _secondary(weights: Weights, number: int, window: Sequence[int], num_candidates: int) -> list[_Seen]:
    """The later tokens that some head looks at from afar. The last ones have too few queries behind them to tell."""
    candidates = weights.from_afar[:, :, num_candidates : len(window) - 2 * NEAR_TOKENS]  # [layers, heads, n]
    looked_at = candidates > SECONDARY_WEIGHT
    found = []
    for offset in np.flatnonzero(looked_at.any(axis=(0, 1))).tolist():
        position = num_candidates + offset
        layers = np.flatnonzero(looked_at[:, :, offset].any(axis=1)).tolist()
        heads, weight = int(looked_at[:, :, offset].sum()), float(candidates[:, :, offset].max())
        found.append(_Seen(int(window[position]), number, position, tuple(layers), heads, weight))
    return found


def _summed_up(found: dict[int, list[_Seen]], tokenizer: Any) -> tuple[SecondarySink, ...]:
    """By token, the one that most heads look at first."""
    sinks = [
        SecondarySink(
            token_id=token_id,
            text="" if tokenizer is None else str(tokenizer.decode([token_id])),
            times=len(seen),
            windows=len({s.window for s in seen}),
            positions=tuple(s.position for s in seen[:8]),
            layers=tuple(sorted({layer for s in seen for layer in s.layers})),
            heads=max(s.heads for s in seen),
            weight=max(s.weight for s in seen),
        )
        for token_id, seen in found.items()
    ]
    return tuple(sorted(sinks, key=lambda sink: (-sink.heads, -sink.weight, sink.token_id)))


def _check(num_windows: int, window_tokens: int, num_candidates: int) -> None:
    if num_windows < 1:
        raise UsageError(problem("windows", received=num_windows, expected=">= 1", fix="change --windows"))
    if num_candidates < 1:
        raise UsageError(problem("candidates", received=num_candidates, expected=">= 1", fix="change --candidates"))
    least = 2 * (num_candidates + NEAR_TOKENS)
    if window_tokens < least:
        raise UsageError(
            problem("window tokens", received=window_tokens, expected=f">= {least} for {num_candidates} candidates",
                    fix="raise --window-tokens or lower --candidates")
        )  # fmt: skip
