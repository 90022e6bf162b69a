"""Statistics of times of equal pieces of work."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Stats:
    """Times of equal pieces of work, in milliseconds."""

    samples: int
    median_ms: float
    p99_ms: float
    min_ms: float

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Stats:
        """Summarise times. p99 follows the nearest-rank rule: it is a measured time. times_ms: at least one."""
        ordered = sorted(times_ms)
        rank = -(-99 * len(ordered) // 100) - 1  # ceil(0.99 n) - 1
        return cls(len(ordered), statistics.median(ordered), ordered[rank], ordered[0])


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times as long one kind of work takes as another; quartiles show how sure that is."""

    median: float
    low_quartile: float
    high_quartile: float

    @classmethod
    def of_turns(cls, turns: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> Ratio:
        """Compare times measured in turns: each turn with the base's turn beside it, then the turns' ratios.

        A machine whose speed changes from minute to minute changes both times of a pair, and not their ratio.
        turns, base: as many turns each, at least one, times of one unit in each.
        """
        ratios = [statistics.median(ours) / statistics.median(theirs) for ours, theirs in zip(turns, base, strict=True)]
        if len(ratios) == 1:
            return cls(ratios[0], ratios[0], ratios[0])
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(median, low, high)
