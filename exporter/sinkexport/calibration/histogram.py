"""Histograms of absolute values over all magnitudes, and the static ranges that can be read off one.

Bins are cut by the bits of float32: 2^8 of equal width between neighbouring powers of two. So a bin is found without
knowing the range beforehand, is 0.2 to 0.4% of its value wide, and counts are integers: they add up to the same in any
order, in any number of runs.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

MANTISSA_BITS = 8
LOWEST_EXPONENT, HIGHEST_EXPONENT = -24, 40
"""Powers of two: what is below counts as if it were there, what is above as if in the last bin."""

NUM_BINS = (HIGHEST_EXPONENT - LOWEST_EXPONENT) << MANTISSA_BITS
_SHIFT = 23 - MANTISSA_BITS  # of float32's 23 bits of mantissa
_FIRST = (LOWEST_EXPONENT + 127) << MANTISSA_BITS

HIGHEST = 127
"""Largest integer: a range's bound becomes it."""

CANDIDATES_PER_OCTAVE = 16
OCTAVES = 10
"""Ranges that are tried are the largest value times 2^(-i / 16), down to a 1,024th of it."""

LEVELS = 128
"""What INT8 leaves of absolute values."""

BINS_PER_LEVEL = 16
"""In the comparison of distributions, as in NVIDIA's description of 8-bit inference: 2,048 bins for 128 levels."""


def count(values: npt.NDArray[np.float32]) -> Counts:
    """int64 [NUM_BINS] of finite values of any shape; their signs do not matter."""
    bits = np.ascontiguousarray(values, np.float32).view(np.int32).reshape(-1) & np.int32(0x7FFFFFFF)
    bins = np.clip((bits >> _SHIFT) - _FIRST, 0, NUM_BINS - 1)
    counts: Counts = np.bincount(bins, minlength=NUM_BINS).astype(np.int64)
    return counts


@functools.cache
def edges() -> Floats:
    """[NUM_BINS + 1], ascending: bin i holds |x| from edge i to below edge i + 1; the first edge is 0."""
    found = np.exp2(np.arange(NUM_BINS + 1) // (1 << MANTISSA_BITS) + float(LOWEST_EXPONENT))
    found *= 1.0 + np.arange(NUM_BINS + 1) % (1 << MANTISSA_BITS) / (1 << MANTISSA_BITS)
    found[0] = 0.0
    return found


def percentile(counts: Counts, highest: float, percent: float) -> float:
    """The least bound that `percent` of the values are not above, to the width of a bin; at most `highest`."""
    total = np.cumsum(counts)
    at = int(np.searchsorted(total, total[-1] * (percent / 100.0)))
    return min(float(edges()[at + 1]), highest)


def least_squared_error(counts: Counts, highest: float) -> float:
    """The candidate whose rounding and clipping have the least squared error (values alike within a bin)."""
    used = np.flatnonzero(counts)
    low, high = edges()[used], edges()[used + 1]
    errors = [squared_error(counts[used], low, high, bound) for bound in candidates(highest)]
    return candidates(highest)[int(np.argmin(errors))]


def squared_error(counts: Counts, low: Floats, high: Floats, bound: float) -> float:
    """Sum over all values of the squared error of rounding to multiples of bound / 127 up to the bound."""
    step = bound / HIGHEST
    a, b = low / step, high / step
    return float((counts * (_integral(b) - _integral(a)) / (b - a)).sum()) * step * step


def _integral(x: Floats) -> Floats:
    """Integral of the squared error of x >= 0 in steps, from 0: 1/12 for each whole step, and what is left over."""
    whole = np.minimum(np.rint(x), HIGHEST)
    integral: Floats = whole / 12.0 + (x - whole) ** 3 / 3.0
    return integral


def least_divergence(counts: Counts, highest: float) -> float:
    """The candidate after whose clipping and rounding the distribution of |x| is nearest to what it was."""
    total = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])
    divergences = [
        divergence(np.diff(np.interp(np.linspace(0.0, bound, LEVELS * BINS_PER_LEVEL + 1), edges(), total)), total[-1])
        for bound in candidates(highest)
    ]
    return candidates(highest)[int(np.argmin(divergences))]


def divergence(inside: Floats, total: float) -> float:
    """Kullback-Leibler divergence (nats) of the distribution clipped to a range from the one rounded to its levels.

    inside: [LEVELS * BINS_PER_LEVEL] counts of equal bins of the range; total: of all values. What lies beyond counts
    in the last bin of the first distribution, and is missing in the second: that is what clipping costs.
    """
    clipped = inside.copy()
    clipped[-1] += total - inside.sum()
    used = (inside > 0).reshape(LEVELS, BINS_PER_LEVEL)
    share = inside.reshape(LEVELS, BINS_PER_LEVEL).sum(axis=1) / np.maximum(used.sum(axis=1), 1)
    rounded = (used * share[:, None]).reshape(-1)  # each level spread over those of its bins that hold anything
    if not rounded.sum():
        return np.inf
    clipped, rounded = clipped / clipped.sum(), rounded / rounded.sum()
    seen = clipped > 0
    return float((clipped[seen] * np.log(clipped[seen] / np.maximum(rounded[seen], np.finfo(np.float64).tiny))).sum())


def candidates(highest: float) -> list[float]:
    """Ranges to choose from, the widest first."""
    return [highest * 2.0 ** (-i / CANDIDATES_PER_OCTAVE) for i in range(OCTAVES * CANDIDATES_PER_OCTAVE)]
