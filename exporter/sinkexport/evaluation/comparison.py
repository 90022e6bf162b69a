"""Comparison of logits, position by position, and of a bundle's prefill with its own steps. Needs no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from sinkrt.contract import Manifest

from sinkexport.evaluation.defaults import DEFAULT_TOLERANCE, TOLERANCE_PER_TOKEN
from sinkexport.util.arrays import Ids, Logits
from sinkexport.util.progress import Report

ROUNDED_INPUTS_TOLERANCE = 1.5
"""Tolerance of a bundle's prefill against its own steps, where matmuls take INT8 inputs.

It holds for quantised weights alone too: MatMulNBits rounds inputs to 8 bits, and differently from 16 tokens on.
(SmolLM2-135M: up to 0.3 of the spread. Each is as far from the matmul with float32 inputs as from the other.)

Prefill and steps add in another order. So some inputs are rounded to the neighbouring integer, and more of them layer
by layer: two roundings of one function are as far from each other as each is from the function. Measured for
SmolLM2-135M with int8-dynamic: up to 0.83 of the spread, and a divergence of 0.02 nats a token. A lost token changes
about 0.5, which looks the same; predictions of something else are 3 and more away. With floating-point inputs nothing
is rounded at run time: prefill then equals the steps bit by bit (INT8 and INT4 weights alike).
"""

ROUNDED_WINDOW_TOLERANCE = 0.15
"""The same where only the window is INT8.

A key or value may become the neighbouring integer, but is rounded once, and attention takes a mean over many. Measured
for SmolLM2-135M: up to 0.053 of the spread; a lost token changes 0.5.
"""


class Stream(Protocol):
    """The part of a `sinkrt.Session` that is used here."""

    def step(self, ids: Ids) -> Logits: ...
    def prefill(self, ids: Ids) -> Logits: ...
    def reset(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Logits of the bundle compared with others.

    name: ``dense | streaming | prefill``. positions: how many were compared, in each stream.
    max_error: largest absolute difference of a logit.
    max_relative_error: the largest difference as a share of the spread (standard deviation over the vocabulary) of the
    same step's logits, at `worst_position`.
    top1_agreement: share of steps in which both have the same most likely token.
    failed_position: the first position above the tolerance, where the comparison stopped; None if there was none.
    reference: of ``streaming``, ``re-rotating | call-following``; None otherwise.
    """

    name: str
    positions: int
    max_error: float
    max_relative_error: float
    worst_position: int
    top1_agreement: float
    failed_position: int | None
    reference: str | None = None


def default_tolerance(manifest: Manifest) -> float:
    """Compute the largest `Comparison.max_relative_error` that rounding explains, by precision and capacity."""
    return max(DEFAULT_TOLERANCE[manifest.weights_dtype], TOLERANCE_PER_TOKEN * manifest.stream.capacity)


def prefill_tolerance(manifest: Manifest) -> float:
    """Compute the largest `Comparison.max_relative_error` of prefill against single steps of the same bundle."""
    quantization = manifest.quantization
    if quantization is not None and (quantization.activations != "float" or quantization.weights != "float"):
        return ROUNDED_INPUTS_TOLERANCE
    rounded_window = quantization is not None and quantization.kv == "int8"
    return max(default_tolerance(manifest), ROUNDED_WINDOW_TOLERANCE if rounded_window else 0.0)


def compare_prefill(
    session: Stream, ids: Ids, at_ends: Mapping[int, Logits], tolerance: float, report: Report
) -> Comparison:
    """Feed the start of the stream again in pieces and compare the logits at their ends.

    ids: [B, N]. at_ends: the bundle's logits token by token, [B, vocab], by the number of tokens fed (`piece_ends`).
    """
    tally, start, total = Tally("prefill", tolerance), 0, max(at_ends)
    session.reset()
    for end, want in sorted(at_ends.items()):
        tally.add(end - 1, session.prefill(ids[:, start:end]), want)
        report("prefill", end, total)
        start = end
        if tally.failed:
            break
    return tally.result()


def piece_ends(num_tokens: int, capacity: int) -> frozenset[int]:
    """Choose where prefill pieces end, over a little more than two caches.

    Lengths are odd before the window fills. One piece is longer than the whole cache; lengths are odd again after it.
    """
    lengths = [1, 2, 5, 3, 1, 7, capacity // 2 + 1, 1, capacity + 1, 4, 1, 9, capacity // 3 + 1]
    ends, end = set(), 0
    for length in lengths:
        end = min(end + length, num_tokens)
        ends.add(end)
    return frozenset(ends)


class Tally:
    """Collects one comparison, step by step."""

    def __init__(self, name: str, tolerance: float) -> None:
        self._name = name
        self._tolerance = tolerance
        self._positions = 0
        self._agreed = 0.0
        self._max_error = 0.0
        self._worst = (0.0, 0)  # relative error, position
        self._failed: int | None = None

    @property
    def failed(self) -> bool:
        return self._failed is not None

    def add(self, position: int, got: Logits, want: Logits) -> None:
        """Compare one position. got, want: [B, vocab]. A value that is not a number counts as an infinite error."""
        difference = np.abs(got.astype(np.float64) - want)  # [B, vocab]
        spread = np.maximum(want.std(axis=-1, keepdims=True, dtype=np.float64), 1e-9)  # [B, 1]
        error, relative = (float(x.max()) for x in (difference, difference / spread))
        if math.isnan(relative):
            error = relative = math.inf
        self._positions += 1
        self._agreed += float((got.argmax(axis=-1) == want.argmax(axis=-1)).mean())
        self._max_error = max(self._max_error, error)
        self._worst = max(self._worst, (relative, position), key=lambda worst: worst[0])
        if relative > self._tolerance and self._failed is None:
            self._failed = position

    def result(self) -> Comparison:
        return Comparison(
            name=self._name,
            positions=self._positions,
            max_error=self._max_error,
            max_relative_error=self._worst[0],
            worst_position=self._worst[1],
            top1_agreement=self._agreed / max(self._positions, 1),
            failed_position=self._failed,
        )
