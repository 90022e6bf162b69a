"""Secondary sinks: later tokens that heads look at from afar.

Source: "On the Existence and Behaviour of Secondary Attention Sinks", arXiv:2512.22213.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sinkexport.analysis.weights import NEAR_TOKENS, Array, Weights

SECONDARY_WEIGHT = 0.05
"""Mean weight from afar that a secondary sink of a head has at least: 1 in 20."""

SECONDARY_RATIO = 5.0
"""Its mean weight is also at least so many times that of queries that look at all tokens alike."""

LIKENESS = 0.5
"""Cosine with the first token's value above which a later token counts as a sink, not as content.

In SmolLM2-135M sinks have 0.7, and words that some head looks for have -0.1 to 0.2.
"""

MAX_SIGHTINGS = 8
"""Sightings of a secondary sink that a report keeps."""


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """What makes a later token a secondary sink: see the constants."""

    weight: float = SECONDARY_WEIGHT
    ratio: float = SECONDARY_RATIO
    likeness: float = LIKENESS


THRESHOLDS = Thresholds()


@dataclasses.dataclass(frozen=True)
class Sighting:
    """A secondary sink at one place. layers: with a head that looks at it. weight: the largest mean weight from afar.

    value_norm, likeness: in the layer of that weight. The first is the norm of the token's value over the median of the
    others'. The second is the cosine of its value and the first token's.
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

    token_id, text: of the token. times: number of places. windows: number of windows with one.
    layers: those with such a head, anywhere. heads: the most (layer, head) pairs at one place.
    sightings: the places, heaviest first, at most `MAX_SIGHTINGS`.
    is_like_first: whether the value resembles the first token's at the heaviest place (`LIKENESS`). Otherwise heads may
    look at the token's content: a name, or the end of a scene.
    """

    token_id: int
    text: str
    times: int
    windows: int
    layers: tuple[int, ...]
    heads: int
    sightings: tuple[Sighting, ...]
    is_like_first: bool


def secondary_sinks(
    weights: Weights, window: int, num_candidates: int, thresholds: Thresholds = THRESHOLDS
) -> Iterator[Sighting]:
    """Yield the later tokens that some head looks at from afar."""
    tokens = _later_tokens(weights, num_candidates)
    from_afar, looked_at = weights.from_afar[:, :, tokens], _looked_at(weights, tokens, thresholds)  # [L, Hq, n]
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


def later_sinks(weights: Weights, num_candidates: int, thresholds: Thresholds = THRESHOLDS) -> Array:
    """Mark heads that look from afar at a later token whose value, in this layer, resembles the first one's.

    Layers with a sliding window have 0: they may keep no sinks, and then nothing of them is calibrated.
    Returns: [L, Hq], 0 or 1.
    """
    tokens = _later_tokens(weights, num_candidates)
    like_first = weights.likeness[:, None, tokens] > thresholds.likeness
    found = np.asarray((_looked_at(weights, tokens, thresholds) & like_first).any(axis=2), dtype=np.float64)
    found[[window is not None for window in weights.sliding_windows]] = 0.0
    return found


def _later_tokens(weights: Weights, num_candidates: int) -> slice:
    """Select the tokens after the candidates. The last ones have too few queries behind them to measure."""
    return slice(num_candidates, weights.received.shape[2] - 2 * NEAR_TOKENS)


def _looked_at(weights: Weights, tokens: slice, thresholds: Thresholds) -> npt.NDArray[np.bool_]:
    """Find whether a head looks at a token from afar. Returns: bool [L, Hq, n]."""
    needed = np.maximum(thresholds.weight, thresholds.ratio * weights.fair_share[:, None, tokens])  # [L, 1, n]
    looked_at: npt.NDArray[np.bool_] = weights.from_afar[:, :, tokens] > needed
    return looked_at


def by_token(sightings: Mapping[int, Sequence[Sighting]], text: Callable[[int], str]) -> tuple[SecondarySink, ...]:
    """Collect sightings by token id. Those like the first token go first, then those that most heads look at."""
    sinks = []
    for token_id, unsorted in sightings.items():
        seen = sorted(unsorted, key=lambda s: -s.weight)
        sinks.append(
            SecondarySink(
                token_id=token_id,
                text=text(token_id),
                times=len(seen),
                windows=len({s.window for s in seen}),
                layers=tuple(sorted({layer for s in seen for layer in s.layers})),
                heads=max(s.heads for s in seen),
                sightings=tuple(seen[:MAX_SIGHTINGS]),
                is_like_first=seen[0].likeness > LIKENESS,
            )
        )
    return tuple(sorted(sinks, key=lambda s: (not s.is_like_first, -s.heads, -s.sightings[0].weight, s.token_id)))
