"""Where a model's attention sinks are, and how many first tokens to keep.

Windows of a text run through the model, each as a context of its own. Every layer's attention weights are summed up by
the token that receives them. Three questions:

* How much attention do the first tokens draw from queries far behind them? (StreamingLLM, arXiv:2309.17453)
* In how many heads is token k a sink? alpha_k is the mean weight that token k receives from the queries i >= k. A head
  has a sink at k if alpha_k > epsilon = 0.3 ("When Attention Sink Emerges in Language Models", arXiv:2410.10781).
* Which later tokens draw attention from afar as well, in which layers? (`secondary_sinks`.) Such sinks resemble the
  first token: their values have its direction and are short.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from sinkrt.errors import UsageError, problem

from sinkexport.analysis.defaults import NUM_CANDIDATES
from sinkexport.analysis.secondary_sinks import (
    THRESHOLDS,
    SecondarySink,
    Sighting,
    Thresholds,
    by_token,
    later_sinks,
    secondary_sinks,
)
from sinkexport.analysis.text_windows import TextWindows
from sinkexport.analysis.weights import NEAR_TOKENS, Array, Weights, WeightsOf, attention_weights
from sinkexport.loading.tokenizers.source_tokenizer import SourceTokenizer
from sinkexport.sources import LoadedModel
from sinkexport.util.progress import Report, silent

EPSILON = 0.3
"""Mean weight above which a token is a sink of a head. Source: arXiv:2410.10781."""

SINK_RATIO = 3.0
"""A first token counts for the recommendation if it draws this many times what any other token draws.

Without it, candidates that happen to be above the mean would add up to more sinks than there are.
"""

COVERAGE = 0.99
"""Share of the first tokens' excess attention that the recommended sinks must draw."""


@dataclasses.dataclass(frozen=True)
class SinkReport:
    """Result of `analyze` over windows of T tokens. K candidates, L layers, Hq query heads.

    beginning: tokens that the tokenizer puts before every text; each window begins with them.
    sliding_window: the model's smallest one, or None.
    mass: [L][Hq][K], mean weight of the first K tokens in queries of a window's second half.
    alpha: [L][Hq][K], mean alpha_k.
    base: mean weight of one token that is neither among the first K nor near, in the queries of `mass`.
    sink_share: [K], Sink^epsilon_k: share of (window, layer, head) with alpha_k > epsilon.
    layer_sinks: [L], share of (window, head) in which some of the first K is a sink.
    key_norm, value_norm: [L][K], norms of the first K tokens' keys and values over the median of the others'.
    secondary: those like the first token, then others; most heads first.
    recommended: S. reason: in words.
    later_sinks: [L][Hq], share of windows in which a head looks from afar at a later token like the first one; 0 in
    layers with a sliding window.
    num_kv_heads: Hkv. distances: [n], tokens.
    change: [L][Hq][n], change of a head's output in a window's second half if it sees only the first K tokens and the
    last `distances`. It is relative to the root mean square of the layer's outputs.
    """

    model: str
    num_windows: int
    window_tokens: int
    num_candidates: int
    beginning: tuple[str, ...]
    sliding_window: int | None
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
        """Mean of `mass` over layers and heads, [K]."""
        mean: Array = np.array(self.mass).mean(axis=(0, 1))
        return mean

    def mass_of_first(self, count: int) -> Array:
        """Sum the attention that the first `count` tokens draw together. Returns: [L, Hq]."""
        total: Array = np.array(self.mass)[:, :, :count].sum(axis=-1)
        return total

    def to_json(self) -> str:
        """Write all figures. The sliding window has the key ``own_window``, which readers of these files know."""
        facts = dataclasses.asdict(self)
        names = {name: "own_window" if name == "sliding_window" else name for name in facts}
        return json.dumps({names[name]: value for name, value in facts.items()}, indent=1) + "\n"


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
    loaded: LoadedModel,
    windows: TextWindows,
    *,
    num_candidates: int = NUM_CANDIDATES,
    report: Report = silent,
    epsilon: float = EPSILON,
    thresholds: Thresholds = THRESHOLDS,
    weights_of: WeightsOf | None = None,
) -> SinkReport:
    """Measure attention in windows of a text.

    Memory depends on a window's length: only sums and secondary sinks are kept of the windows before.
    report: called with the stage ``layers``. epsilon: mean weight above which a first token is a sink.
    thresholds: of later ones. weights_of: see `attention_weights`.

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
    sums, num_layers = _Sums(num_candidates, epsilon, thresholds), int(config.num_hidden_layers)
    report("layers", 0, num_windows * num_layers)
    for number, ids in enumerate(windows.ids):
        show = functools.partial(_show, report, number * num_layers, num_windows * num_layers)
        sums.add(attention_weights(loaded.model, ids, num_candidates, show, weights_of=weights_of), number, ids)
    mean = sums.means()
    recommended, reason = recommend(mean["late"].mean(axis=(0, 1)), float(mean["base"]))
    return SinkReport(
        model=loaded.name,
        num_windows=num_windows,
        window_tokens=window_tokens,
        num_candidates=num_candidates,
        beginning=tuple(_text(loaded.tokenizer, token) for token in windows.ids[0][: windows.beginning]),
        sliding_window=sums.sliding_window,
        mass=_nested(mean["late"]),
        alpha=_nested(mean["alpha"]),
        base=float(mean["base"]),
        epsilon=epsilon,
        sink_share=_nested(mean["sinks"].mean(axis=(0, 1))),
        layer_sinks=_nested(mean["any_sink"].mean(axis=1)),
        key_norm=_nested(mean["key_norm"]),
        value_norm=_nested(mean["value_norm"]),
        secondary=by_token(sums.sightings, functools.partial(_text, loaded.tokenizer)),
        recommended=recommended,
        reason=reason,
        later_sinks=_nested(mean["later_sinks"]),
        num_kv_heads=sums.num_kv_heads,
        distances=sums.distances,
        change=_nested(mean["change"]),
    )


def _show(report: Report, before: int, total: int, layers: int) -> None:
    report("layers", before + layers, total)


def recommend(mass: Array, base: float) -> tuple[int, str]:
    """Recommend how many first tokens to keep, and say why.

    mass: [K], mean weight of the first tokens from afar. base: that of any other token.
    Only tokens that draw `SINK_RATIO` times `base` count, with their excess over it: a token that draws about what
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
    """Sums over the windows, and their secondary sinks."""

    def __init__(self, num_candidates: int, epsilon: float, thresholds: Thresholds) -> None:
        self._num_candidates, self._epsilon, self._thresholds = num_candidates, epsilon, thresholds
        self._count = 0
        self._sums: dict[str, Array] = {}
        self.sliding_window: int | None = None
        self.num_kv_heads = 0
        self.distances: tuple[int, ...] = ()
        self.sightings: dict[int, list[Sighting]] = {}

    def add(self, weights: Weights, window: int, ids: Sequence[int]) -> None:
        first = slice(self._num_candidates)
        is_sink = weights.received[:, :, first] > self._epsilon
        added: dict[str, Array] = {
            "late": weights.late,
            "alpha": weights.received[:, :, first],
            "base": np.array(weights.base),
            "sinks": is_sink.astype(np.float64),
            "any_sink": is_sink.max(axis=-1).astype(np.float64),
            "key_norm": weights.key_norm[:, first],
            "value_norm": weights.value_norm[:, first],
            "later_sinks": later_sinks(weights, self._num_candidates, self._thresholds),
            "change": weights.change,
        }
        for name, values in added.items():
            self._sums[name] = values + self._sums.get(name, 0.0)
        self._count += 1
        self.sliding_window = weights.sliding_window
        self.num_kv_heads, self.distances = weights.num_kv_heads, weights.distances
        for sighting in secondary_sinks(weights, window, self._num_candidates, self._thresholds):
            self.sightings.setdefault(int(ids[sighting.position]), []).append(sighting)

    def means(self) -> dict[str, Array]:
        return {name: values / self._count for name, values in self._sums.items()}


def _text(tokenizer: SourceTokenizer | None, token_id: int) -> str:
    return "" if tokenizer is None else tokenizer.decode([token_id])


def _nested(array: Array) -> Any:
    """Nest tuples of floats, rounded to 8 digits."""
    return tuple(_nested(row) for row in array) if array.ndim else round(float(array), 8)
