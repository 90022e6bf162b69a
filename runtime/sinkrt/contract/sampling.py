"""Options of sampling, each described once: default, range, and what it does.

The C++ runtime's `SamplingParams`, its checks, the C interface's fields and the flags of its example are generated from
this list (runtime/cpp/tools/make_manifest.py).
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from dataclasses import dataclass, field
from typing import Any

from sinkrt.errors import UsageError, problem

KEY = "range"
"""Key of a field's metadata that holds its range."""


@dataclass(frozen=True)
class Range:
    """What one option may be. least, most: included. expected: the range in words. zero: what 0 means in C's struct."""

    doc: str
    least: float
    most: float
    expected: str
    zero: str


def between(least: float, most: float, expected: str, doc: str, *, zero: str) -> dict[str, Range]:
    """Return an option's metadata."""
    return {KEY: Range(doc, least, most, expected, zero)}


def range_of(option: dataclasses.Field[Any]) -> Range:
    """Return the range of an option."""
    found: Range = option.metadata[KEY]
    return found


SEED_LIMIT = 2**64
MAX_TOP_K = 2**31 - 1
MIN_PENALTY, MAX_PENALTY = 0.01, 100.0
"""Limits beyond which the logits of real models overflow float32 or lose all their differences."""


@dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    temperature: 0 .. 100, 0 is greedy. top_k: keep the k likeliest tokens (0: all). top_p: in (0, 1], keep the smallest
    set whose probability reaches p (arXiv:1904.09751). repetition_penalty: 0.01 .. 100, > 1 makes tokens of the
    cache's reach less likely (arXiv:1909.05858). seed: 0 .. 2^64-1; None draws one.

    Raises: UsageError.
    """

    temperature: float = field(
        default=0.0,
        metadata=between(0, 100, "0 .. 100 (0: greedy)", "what logits are divided by; 0: greedy", zero="greedy"),
    )
    top_k: int = field(
        default=0,
        metadata=between(
            0, MAX_TOP_K, f"0 .. {MAX_TOP_K} (0: all tokens)", "keep the k likeliest; 0: all tokens", zero="all tokens"
        ),
    )
    top_p: float = field(
        default=1.0,
        metadata=between(
            math.ulp(0.0), 1, "a number in (0, 1]", "keep the smallest set of probability p", zero="all tokens"
        ),
    )
    repetition_penalty: float = field(
        default=1.0,
        metadata=between(
            MIN_PENALTY,
            MAX_PENALTY,
            f"{MIN_PENALTY} .. {MAX_PENALTY:.0f} (1: none)",
            "above 1: tokens in the cache become less likely; 1: none",
            zero="none",
        ),
    )
    seed: int | None = field(
        default=None,
        metadata=between(
            0,
            SEED_LIMIT - 1,
            f"0 .. {SEED_LIMIT - 1}",
            "the same seed and stream draw the same tokens; none: drawn by `resolved`",
            zero="a seed like others",
        ),
    )

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if not (value is None and option.default is None):
                _check(option, value)


def _check(option: dataclasses.Field[Any], value: Any) -> None:
    found = range_of(option)
    kind = numbers.Integral if str(option.type).startswith("int") else numbers.Real  # NumPy's scalars are, too
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    # Compared, not converted: an integer may be too large for a float. No comparison holds for NaN.
    if not is_number or not found.least <= value <= found.most:
        name = option.name
        raise UsageError(problem(name, received=_shown(value), expected=found.expected, fix=f"change {name}"))


def _shown(value: object) -> str:
    if isinstance(value, int) and abs(value) >= 10**30:  # Python refuses to write the longest ones
        return "a huge number"
    return str(value) if isinstance(value, numbers.Real) else repr(value)[:60]
