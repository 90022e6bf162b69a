"""Static ranges of an input, from its histograms."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sinkexport.calibration import histogram
from sinkexport.calibration.file import Span, rounded
from sinkexport.calibration.observers import REST, SINKS
from sinkexport.quant.recipe import Calibration


def spans(
    counts: histogram.Counts, highest: npt.NDArray[np.float32], asked: Calibration
) -> tuple[Span, Span | None, Span]:
    """Spans of the rest, of sinks and of all. Sinks are few and their largest values matter most: none is left out.

    counts: int64 [2, NUM_BINS] and highest: float32 [2], of the rest and of sinks.
    """

    def span(of: histogram.Counts, top: float) -> Span:
        return Span(highest=rounded(top), range=rounded(chosen_range(of, top, asked)))

    sinks = rounded(highest[SINKS])
    return (
        span(counts[REST], float(highest[REST])),
        Span(highest=sinks, range=sinks) if counts[SINKS].any() else None,
        span(counts.sum(axis=0), float(highest.max())),
    )


def chosen_range(counts: histogram.Counts, highest: float, asked: Calibration) -> float:
    """The bound that a method chooses for values with these counts. highest: the largest value."""
    if asked.method == "minmax" or highest == 0.0:
        return highest
    if asked.percentile is not None:
        return histogram.percentile(counts, highest, asked.percentile)
    choose = histogram.least_divergence if asked.method == "entropy" else histogram.least_squared_error
    return choose(counts, highest)
