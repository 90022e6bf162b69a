"""Logits against logits, position by position, and a bundle's prefill against its own steps. Needs no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
from sinkrt.contract import Manifest

from sinkexport.util.progress import Report

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


DEFAULT_TOLERANCE: Mapping[str, float] = {"float32": 1e-3, "float16": 0.25}
"""Largest error of a logit, as a share of the spread of its step's logits, by the bundle's weights_dtype.

Bundle and reference round differently (order of sums, fused operators). Measured over six wraps with W = 60: 4e-5 for
SmolLM2-135M in float32 and up to 2e-5 for tiny random models of every family; 8e-2 and 4e-2 in float16, which rounds
weights and large activations (the reference keeps both in float32). The tolerances leave room for larger models.
"""

TOLERANCE_PER_TOKEN = 2e-6
"""The same for each token of the cache's capacity, where that is more.

transformers multiplies position and frequency in float32, which near position C is wrong by up to C * 2^-24 radians,
in the dense model and in the reference alike; the bundle's own angles are exact. Measured for SmolLM2-135M with
W = 1020 over six wraps: 5e-4, of which 6e-5 is left if the reference's cos and sin are computed in float64.
"""


ROUNDED_INPUTS_TOLERANCE = 1.5
"""Of a bundle's prefill against its own steps, where products take INT8 inputs.

With quantised weights alone too: MatMulNBits rounds inputs to 8 bits, and for 16 tokens and more otherwise than for one
(SmolLM2-135M: up to 0.3 of the spread, each as far from the product with float32 inputs as they are from each other).

Prefill and steps add in another order, so some inputs are rounded to the neighbouring integer, and layer by layer more
of them: two roundings of one function are as far from each other as each is from the function. Measured for
SmolLM2-135M with int8-dynamic: up to 0.83 of the spread, and a divergence of 0.02 nats a token. A token that is lost
changes about 0.5 and cannot be told from that; predictions of something else are 3 and more away. With floating-point
inputs nothing is rounded at run time: prefill then equals the steps bit by bit (INT8 and INT4 weights alike).
"""

ROUNDED_WINDOW_TOLERANCE = 0.15
"""The same where only the window is INT8: a key or value may become the neighbouring integer, but it is rounded once,
and attention takes a mean over many. Measured for SmolLM2-135M: up to 0.053 of the spread; a lost token changes 0.5."""


class Stream(Protocol):
    """What is asked of a `sinkrt.Session`."""

    def step(self, ids: Ids) -> Logits: ...
    def prefill(self, ids: Ids) -> Logits: ...
    def reset(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Logits of the bundle against others'.

    name: ``dense | streaming | prefill``. positions: how many were compared, in each stream.
    max_error: largest absolute difference of a logit. max_relative_error: the largest share of the spread (standard
    deviation over the vocabulary) of the same step's logits, at `worst_position`.
    top1_agreement: share of steps in which both put the same token first.
    failed_position: the first position above the tolerance, where the comparison stopped; None if there was none.
    """

    name: str
    positions: int
    max_error: float
    max_relative_error: float
    worst_position: int
    top1_agreement: float
    failed_position: int | None


def default_tolerance(manifest: Manifest) -> float:
    """Largest `Comparison.max_relative_error` that rounding explains, for a bundle's precision and capacity."""
    return max(DEFAULT_TOLERANCE[manifest.weights_dtype], TOLERANCE_PER_TOKEN * manifest.stream.capacity)


def prefill_tolerance(manifest: Manifest) -> float:
    """Largest `Comparison.max_relative_error` of prefill against single steps of the same bundle."""
    quantization = manifest.quantization
    if quantization is not None and (quantization.activations != "float" or quantization.weights != "float"):
        return ROUNDED_INPUTS_TOLERANCE
    rounded_window = quantization is not None and quantization.kv == "int8"
    return max(default_tolerance(manifest), ROUNDED_WINDOW_TOLERANCE if rounded_window else 0.0)


def compare_prefill(
    session: Stream, ids: Ids, at_ends: Mapping[int, Logits], tolerance: float, report: Report
) -> Comparison:
    """Feed the start of the stream again in pieces and compare the logits at their ends.

    ids: [B, N]. at_ends: what the bundle gave token by token, [B, vocab], by the number of tokens fed: `piece_ends`.
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
    """Where prefill pieces end: odd lengths before the window fills, one piece longer than the whole cache, and
    odd lengths again, over at most two caches and a bit."""
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
        """got, want: [B, vocab] of one position. What is not a number counts as an infinite error."""
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
