"""Where a model's attention sinks are, and how many first tokens to keep.

Windows of a text run through the model, each as a context of its own, and every layer's attention weights are summed up
by the token that receives them. Three questions:

* How much attention do the first tokens draw from queries far behind them? (StreamingLLM, arXiv:2309.17453)
* In how many heads is token k a sink? alpha_k is the mean weight that token k receives from the queries i >= k, and a
  head has a sink at k if alpha_k > epsilon = 0.3 ("When Attention Sink Emerges in Language Models", arXiv:2410.10781).
* Which later tokens draw attention from afar as well, in which layers? ("On the Existence and Behaviour of Secondary
  Attention Sinks", arXiv:2512.22213.) Such sinks resemble the first token: their values point its way and are short.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sinkrt.errors import UsageError, problem

from sinkexport.analysis.weights import NEAR_TOKENS, Array, Weights, attention_weights
from sinkexport.loading.tokenizers.source_tokenizer import SourceTokenizer
from sinkexport.sources import LoadedModel
from sinkexport.util.progress import Report, silent

EPSILON = 0.3
"""Mean weight above which arXiv:2410.10781 calls a token a sink of a head."""

SECONDARY_WEIGHT = 0.05
"""Mean weight from afar that makes a later token a secondary sink of a head: 1 in 20 ..."""

SECONDARY_RATIO = 5.0
"""... if it is also this many times what the token would get from queries that look at all tokens alike."""

SINK_RATIO = 3.0
"""A first token counts for the recommendation if it draws this many times what any other token draws. Without it,
the sum over all candidates of how much some happen to be above the mean would ask for more sinks than there are."""

COVERAGE = 0.99
"""Share of the first tokens' excess attention that the recommended sinks must draw."""

LIKENESS = 0.5
"""Cosine with the first token's value above which a later token is taken for a sink rather than for its content. In
SmolLM2-135M the sinks have 0.7, and words that some head looks for -0.1 to 0.2."""

MAX_SIGHTINGS = 8
"""Sightings of a secondary sink that a report keeps."""


@dataclasses.dataclass(frozen=True)
class Sighting:
    """A secondary sink at a place. layers: with a head that looks at it. weight: the largest mean weight from afar.

    value_norm, likeness: of the token, in the layer of that weight: its value's norm over the median of the others',
    and the cosine of its value and the first token's.
    """

    window: int
    position: int
    layers: tuple[int, ...]
    heads: int
    weight: float
    value_norm: float
    likeness: float


@dataclasses.dataclass(frozen=True)
class SecondarySink:
    """A later token that heads look at from afar.

    token_id, text: of the token. times: at how many places it is one. windows: in how many windows.
    layers: those with such a head, anywhere. heads: the most (layer, head) pairs at one place.
    sightings: the places, heaviest first, at most `MAX_SIGHTINGS`.
    is_like_first: whether the value resembles the first token's at the heaviest place (`LIKENESS`). Otherwise heads may
    look at what the token says: a name, or the end of a scene.
    """

    token_id: int
    text: str
    times: int
    windows: int
    layers: tuple[int, ...]
    heads: int
    sightings: tuple[Sighting, ...]
    is_like_first: bool


@dataclasses.dataclass(frozen=True)
class SinkReport:
    """What `analyze` found in windows of T tokens. K candidates, L layers, Hq query heads.

    beginning: tokens that the tokenizer puts before every text; each window begins with them.
    mass: [L][Hq][K], mean weight of the first K tokens in queries of a window's second half.
    alpha: [L][Hq][K], mean alpha_k.
    base: mean weight of one token that is neither among the first K nor near, in the queries of `mass`.
    sink_share: [K], Sink^epsilon_k: share of (window, layer, head) with alpha_k > epsilon.
    layer_sinks: [L], share of (window, head) in which some of the first K is a sink.
    key_norm, value_norm: [L][K], norms of the first K tokens' keys and values over the median of the others'.
    secondary: those like the first token, then others; most heads first.
    own_window: the model's smallest sliding window, or None.
    recommended: S. reason: in words.
    later_sinks: [L][Hq], share of windows in which a head looks from afar at a later token like the first one; 0 in
    layers with a sliding window of their own.
    num_kv_heads: Hkv. change: [L][Hq][n], how much a head's output changes in a window's second half if it sees the
    first K tokens and the last `distances` alone, over the root mean square of the layer's outputs.
    """

    model: str
    num_windows: int
    window_tokens: int
    num_candidates: int
    beginning: tuple[str, ...]
    own_window: int | None
    mass: tuple[tuple[tuple[float, ...], ...], ...]
    alpha: tuple[tuple[tuple[float, ...], ...], ...]
    base: float
    epsilon: float
    sink_share: tuple[float, ...]
    layer_sinks: tuple[float, ...]
    key_norm: tuple[tuple[float, ...], ...]
    value_norm: tuple[tuple[float, ...], ...]
    secondary: tuple[SecondarySink, ...]
    recommended: int
    reason: str
    later_sinks: tuple[tuple[float, ...], ...]
    num_kv_heads: int
    distances: tuple[int, ...]
    change: tuple[tuple[tuple[float, ...], ...], ...]

    @property
    def mass_by_position(self) -> Array:
        """[K]: mean over layers and heads."""
        mean: Array = np.array(self.mass).mean(axis=(0, 1))
        return mean

    def mass_of_first(self, count: int) -> Array:
        """[L, Hq]: what the first `count` tokens draw together."""
        total: Array = np.array(self.mass)[:, :, :count].sum(axis=-1)
        return total

    def to_json(self) -> str:
        """All figures."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


@dataclasses.dataclass(frozen=True)
class TextWindows:
    """Contexts of T tokens each. beginning: how many of them the tokenizer puts before every text."""

    ids: tuple[tuple[int, ...], ...]
    beginning: int = 0


def text_windows(tokenizer: SourceTokenizer, text: str, num_windows: int, window_tokens: int) -> TextWindows:
    """Consecutive pieces of a text, each after what the tokenizer puts before a text, as a stream begins.

    No more of the text is encoded than is needed.

    Raises: UsageError if the text is too short.
    """
    before = tokenizer.beginning
    piece = window_tokens - len(before)
    needed = num_windows * piece
    chars, ids = 4 * needed, []
    while True:
        ids = tokenizer.encode(text[:chars], special=False)
        if len(ids) > needed or chars >= len(text):  # the last token may be half a word
            break
        chars *= 2
    if piece < 1 or len(ids) < needed:
        raise UsageError(
            problem(
                "text",
                received=f"{len(ids):,} tokens",
                fix="use a longer text, or fewer or shorter windows",
                expected=f"{num_windows} windows of {window_tokens:,} tokens",
            )
        )
    starts = range(0, needed, max(piece, 1))
    return TextWindows(tuple((*before, *ids[start : start + piece]) for start in starts), len(before))


def check_geometry(num_windows: int, window_tokens: int, num_candidates: int) -> None:
    """Refuse numbers that leave nothing to measure.

    Raises: UsageError.
    """
    if num_windows < 1:
        raise UsageError(problem("windows", received=num_windows, expected=">= 1", fix="change --windows"))
    if num_candidates < 1:
        raise UsageError(problem("candidates", received=num_candidates, expected=">= 1", fix="change --candidates"))
    least = 2 * (num_candidates + NEAR_TOKENS)
    if window_tokens < least:
        raise UsageError(
            problem(
                "window tokens",
                received=window_tokens,
                expected=f">= {least} for {num_candidates} candidates",
                fix="raise --window-tokens or lower --candidates",
            )
        )


def analyze(
    loaded: LoadedModel, windows: TextWindows, *, num_candidates: int = 16, report: Report = silent
) -> SinkReport:
    """Measure attention in windows of a text.

    Memory depends on a window's length: of those that are done only sums stay, and their secondary sinks.
    report: told of the stage ``layers``.

    Raises: UsageError for numbers out of range, windows longer than the model knows positions, or a model whose
    attention cannot be measured (see `attention_weights`).
    """
    num_windows, window_tokens = len(windows.ids), len(windows.ids[0]) if windows.ids else 0
    check_geometry(num_windows, window_tokens, num_candidates)
    config = loaded.model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and window_tokens > limit:
        raise UsageError(
            problem(
                "window tokens",
                received=window_tokens,
                expected=f"<= {limit}, the model's positions",
                fix="lower --window-tokens",
            )
        )
    sums, num_layers = _Sums(num_candidates), int(config.num_hidden_layers)
    report("layers", 0, num_windows * num_layers)
    for number, ids in enumerate(windows.ids):
        tell = functools.partial(_tell, report, number * num_layers, num_windows * num_layers)
        sums.add(attention_weights(loaded.model, ids, num_candidates, tell), number, ids)
    mean = sums.means()
    recommended, reason = recommend(mean["late"].mean(axis=(0, 1)), float(mean["base"]))
    return SinkReport(
        model=loaded.name,
        num_windows=num_windows,
        window_tokens=window_tokens,
        num_candidates=num_candidates,
        beginning=tuple(_text(loaded.tokenizer, token) for token in windows.ids[0][: windows.beginning]),
        own_window=sums.own_window,
        mass=_nested(mean["late"]),
        alpha=_nested(mean["alpha"]),
        base=float(mean["base"]),
        epsilon=EPSILON,
        sink_share=_nested(mean["sinks"].mean(axis=(0, 1))),
        layer_sinks=_nested(mean["any_sink"].mean(axis=1)),
        key_norm=_nested(mean["key_norm"]),
        value_norm=_nested(mean["value_norm"]),
        secondary=_by_token(sums.sightings, loaded.tokenizer),
        recommended=recommended,
        reason=reason,
        later_sinks=_nested(mean["later_sinks"]),
        num_kv_heads=sums.num_kv_heads,
        distances=sums.distances,
        change=_nested(mean["change"]),
    )


def _tell(report: Report, before: int, total: int, layers: int) -> None:
    report("layers", before + layers, total)


def recommend(mass: Array, base: float) -> tuple[int, str]:
    """How many first tokens to keep, and why.

    mass: [K], mean weight of the first tokens from afar. base: that of any other token.
    What counts is the excess over `base` of those that draw `SINK_RATIO` times as much: a token that draws about what
    every token draws is no sink.
    """
    excess = np.where(mass > SINK_RATIO * base, mass - base, 0.0)
    total = float(excess.sum())
    if total <= mass.size * base:  # together they draw less than twice what K others do
        return 0, (
            f"no sinks: the first {mass.size} tokens draw {mass.sum():.1%} of the attention from afar, "
            f"{mass.size} others {mass.size * base:.1%}"
        )
    needed = min(int(np.searchsorted(np.cumsum(excess), COVERAGE * total)) + 1, mass.size)
    who = "the first token draws" if needed == 1 else f"the first {needed} tokens draw"
    reason = f"{who} {float(mass[:needed].sum()):.1%} of all attention from afar, any other token {base:.2%}"
    if needed == mass.size:
        reason += "; sinks reach to the last candidate, so raise --candidates"
    elif needed < mass.size:
        reason += f", and tokens {needed} to {mass.size - 1} {float(mass[needed:].mean()):.2%} each"
    return needed, reason


class _Sums:
    """What the windows have in common, summed up; of the windows themselves only secondary sinks are kept."""

    def __init__(self, num_candidates: int) -> None:
        self._num_candidates = num_candidates
        self._count = 0
        self._sums: dict[str, Array] = {}
        self.own_window: int | None = None
        self.num_kv_heads = 0
        self.distances: tuple[int, ...] = ()
        self.sightings: dict[int, list[Sighting]] = {}

    def add(self, weights: Weights, window: int, ids: Sequence[int]) -> None:
        first = slice(self._num_candidates)
        is_sink = weights.received[:, :, first] > EPSILON
        added: dict[str, Array] = {
            "late": weights.late,
            "alpha": weights.received[:, :, first],
            "base": np.array(weights.base),
            "sinks": is_sink.astype(np.float64),
            "any_sink": is_sink.max(axis=-1).astype(np.float64),
            "key_norm": weights.key_norm[:, first],
            "value_norm": weights.value_norm[:, first],
            "later_sinks": later_sinks(weights, self._num_candidates),
            "change": weights.change,
        }
        for name, values in added.items():
            self._sums[name] = values + self._sums.get(name, 0.0)
        self._count += 1
        self.own_window = weights.own_window
        self.num_kv_heads, self.distances = weights.num_kv_heads, weights.distances
        for sighting in secondary_sinks(weights, window, self._num_candidates):
            self.sightings.setdefault(int(ids[sighting.position]), []).append(sighting)

    def means(self) -> dict[str, Array]:
        return {name: values / self._count for name, values in self._sums.items()}


def secondary_sinks(weights: Weights, window: int, num_candidates: int) -> Iterator[Sighting]:
    """The later tokens that some head looks at from afar."""
    tokens = _later_tokens(weights, num_candidates)
    from_afar, looked_at = weights.from_afar[:, :, tokens], _looked_at(weights, tokens)  # [L, Hq, n]
    for offset in np.flatnonzero(looked_at.any(axis=(0, 1))).tolist():
        position = num_candidates + offset
        by_layer = np.where(looked_at[:, :, offset], from_afar[:, :, offset], 0.0).max(axis=1)  # [L]
        layer = int(by_layer.argmax())
        yield Sighting(
            window=window,
            position=position,
            layers=tuple(np.flatnonzero(by_layer).tolist()),
            heads=int(looked_at[:, :, offset].sum()),
            weight=float(by_layer[layer]),
            value_norm=float(weights.value_norm[layer, position]),
            likeness=float(weights.likeness[layer, position]),
        )


def later_sinks(weights: Weights, num_candidates: int) -> Array:
    """[L, Hq]: 1 for heads that look from afar at a later token whose value, in this layer, resembles the first one's.

    Layers with a sliding window of their own have 0: they may keep no sinks, and then nothing of them is calibrated.
    """
    tokens = _later_tokens(weights, num_candidates)
    like_first = weights.likeness[:, None, tokens] > LIKENESS
    found = np.asarray((_looked_at(weights, tokens) & like_first).any(axis=2), dtype=np.float64)
    found[[own is not None for own in weights.own_windows]] = 0.0
    return found


def _later_tokens(weights: Weights, num_candidates: int) -> slice:
    """Those after the candidates; the last ones have too few queries behind them to tell."""
    return slice(num_candidates, weights.received.shape[2] - 2 * NEAR_TOKENS)


def _looked_at(weights: Weights, tokens: slice) -> npt.NDArray[np.bool_]:
    """[L, Hq, n]: whether a head looks at a token from afar."""
    needed = np.maximum(SECONDARY_WEIGHT, SECONDARY_RATIO * weights.fair_share[:, None, tokens])  # [L, 1, n]
    looked_at: npt.NDArray[np.bool_] = weights.from_afar[:, :, tokens] > needed
    return looked_at


def _by_token(sightings: dict[int, list[Sighting]], tokenizer: SourceTokenizer | None) -> tuple[SecondarySink, ...]:
    """One entry a token: those like the first token before others, then those that most heads look at."""
    sinks = []
    for token_id, unsorted in sightings.items():
        seen = sorted(unsorted, key=lambda s: -s.weight)
        sinks.append(
            SecondarySink(
                token_id=token_id,
                text=_text(tokenizer, token_id),
                times=len(seen),
                windows=len({s.window for s in seen}),
                layers=tuple(sorted({layer for s in seen for layer in s.layers})),
                heads=max(s.heads for s in seen),
                sightings=tuple(seen[:MAX_SIGHTINGS]),
                is_like_first=seen[0].likeness > LIKENESS,
            )
        )
    return tuple(sorted(sinks, key=lambda s: (not s.is_like_first, -s.heads, -s.sightings[0].weight, s.token_id)))


def _text(tokenizer: SourceTokenizer | None, token_id: int) -> str:
    return "" if tokenizer is None else tokenizer.decode([token_id])


def _nested(array: Array) -> Any:
    """Tuples in tuples of floats, rounded to what is worth reading."""
    return tuple(_nested(row) for row in array) if array.ndim else round(float(array), 8)
