"""Perplexity of anything that predicts the tokens of a text, in constant memory and without torch.

The score of a token is its negative log-likelihood (NLL, nats) under the prediction from the tokens before it, in
float64. Perplexity is exp of the mean NLL. Sums are kept by segment of the text, for the curve over the text and the
standard error. Neighbouring tokens are alike, so segments count as independent and tokens do not.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from sinkrt.errors import BackendError, UsageError, problem

from sinkexport.util.progress import Report, silent

Ids = npt.NDArray[np.int64]
ROWS_AT_ONCE = 16
"""Predictions that are in memory as float64 at a time: 16 of 50,000 logits are 6 MB."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Logits [n, vocab] in any floating dtype. Row i predicts token `first_token` + i of the text."""

    first_token: int
    logits: npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A way to predict the tokens of one text.

    name: short, for tables, plots and JSON. note: what it computes, in a few words.
    num_tokens: how many tokens it predicts: 1 .. num_tokens of the text (token 0 has nothing before it).
    predictions: starts it; yields these tokens in order, each once. The next prediction may overwrite the last one's
    array.
    """

    name: str
    note: str
    num_tokens: int
    predictions: Callable[[], Iterator[Prediction]]


@dataclasses.dataclass(frozen=True)
class Segment:
    """Tokens first_token .. first_token + num_tokens - 1 of the text. nll: their mean, nats a token."""

    first_token: int
    num_tokens: int
    nll: float
    perplexity: float


@dataclasses.dataclass(frozen=True)
class Curve:
    """Perplexity of a predictor over a text.

    num_tokens: predicted tokens. nll: mean, nats a token. perplexity: exp(nll).
    standard_error: of the perplexity, from the spread over its segments; None with fewer than two.
    perplexity_before, perplexity_after: of the tokens predicted before and after the first eviction; None without any.
    tokens_per_s: without the time that scoring takes. seconds: all of the time.
    """

    name: str
    note: str
    num_tokens: int
    nll: float
    perplexity: float
    standard_error: float | None
    perplexity_before: float | None
    perplexity_after: float | None
    tokens_per_s: float
    seconds: float
    segments: tuple[Segment, ...]


def measure(predictor: Predictor, ids: Ids, *, segment_tokens: int, capacity: int, report: Report = silent) -> Curve:
    """Score the tokens of ids [N], N >= 2, that the predictor predicts.

    segment_tokens: length of a segment, >= 1. The first segment has a prediction less: nothing predicts token 0.
    capacity: C, tokens of the cache. Token C is the last one that is predicted before an eviction.
    report: called with the stage `predictor.name`.

    Raises: UsageError for a bad argument; BackendError if a prediction is not a number; what the predictor raises.
    """
    check_segment(segment_tokens)
    check_text(ids)
    sums = np.zeros((2, -(-len(ids) // segment_tokens)))  # tokens and nats, by segment
    before = np.zeros((2, 2))  # tokens and nats, [:, 0] after the first eviction, [:, 1] before it
    done, predicting_s, start = 0, 0.0, time.perf_counter()
    report(predictor.name, 0, predictor.num_tokens)
    predictions = predictor.predictions()
    while True:
        asked = time.perf_counter()
        prediction = next(predictions, None)
        predicting_s += time.perf_counter() - asked
        if prediction is None:
            break
        tokens = prediction.first_token + np.arange(len(prediction.logits))
        nll = token_nll(prediction.logits, ids[tokens])
        if np.isnan(nll).any():
            raise BackendError(
                problem(
                    f"{predictor.name}: prediction of token {tokens[np.isnan(nll)][0]}",
                    received="logits that are not numbers",
                    expected="finite logits",
                    fix="check the weights, or use fp32",
                )
            )
        for total, index in ((sums, tokens // segment_tokens), (before, (tokens <= capacity).astype(np.int64))):
            np.add.at(total[0], index, 1)
            np.add.at(total[1], index, nll)
        done += len(tokens)
        report(predictor.name, done, predictor.num_tokens)
    (after_tokens, before_tokens), (after_nats, before_nats) = before
    nll_mean = float(sums[1].sum() / done)
    return Curve(
        name=predictor.name,
        note=predictor.note,
        num_tokens=done,
        nll=nll_mean,
        perplexity=exponential(nll_mean),
        standard_error=standard_error(sums[0], sums[1]),
        perplexity_before=exponential(before_nats / before_tokens) if before_tokens else None,
        perplexity_after=exponential(after_nats / after_tokens) if after_tokens else None,
        tokens_per_s=done / max(predicting_s, 1e-9),
        seconds=time.perf_counter() - start,
        segments=tuple(
            Segment(max(i * segment_tokens, 1), int(count), float(nats / count), exponential(nats / count))
            for i, (count, nats) in enumerate(sums.T)
            if count
        ),
    )


def token_nll(logits: npt.NDArray[Any], targets: Ids) -> npt.NDArray[np.float64]:
    """Compute -log softmax(logits)[target] by row, nats. logits: [n, vocab]. targets: [n]. Returns: float64 [n]."""
    nll = np.empty(len(targets))
    with np.errstate(invalid="ignore", over="ignore"):  # `measure` reports what is not a number
        for start in range(0, len(targets), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            block = logits[rows].astype(np.float64)
            block -= block.max(axis=-1, keepdims=True)
            target_logits = np.take_along_axis(block, targets[rows, None], axis=-1)[:, 0]
            nll[rows] = np.log(np.exp(block, out=block).sum(axis=-1)) - target_logits
    return nll


def check_segment(segment_tokens: int) -> None:
    """Check a segment's length. Raises: UsageError unless segment_tokens >= 1."""
    if segment_tokens < 1:
        raise UsageError(problem("segment", received=segment_tokens, expected=">= 1 token", fix="change --segment"))


def check_text(ids: Ids) -> None:
    """Check a text. Raises: UsageError unless there is a token to predict, and one to predict it from."""
    if len(ids) < 2:
        raise UsageError(
            problem(
                "text",
                received=f"{len(ids)} token{'s' * (len(ids) != 1)}",
                expected="at least 2: each is predicted from those before it",
                fix="pass a longer text",
            )
        )


def standard_error(counts: npt.NDArray[np.float64], nats: npt.NDArray[np.float64]) -> float | None:
    """Estimate the standard error of exp(sum of nats / sum of counts) over segments of unequal length.

    Source: a ratio estimate and the delta method. counts, nats: float64 [segments]. None with fewer than two segments.
    """
    counts, nats = counts[counts > 0], nats[counts > 0]
    num_segments, total = len(counts), counts.sum()
    if num_segments < 2:
        return None
    mean = nats.sum() / total
    variance = num_segments / (num_segments - 1) * float(((nats - mean * counts) ** 2).sum()) / total**2
    return exponential(mean) * math.sqrt(variance)


def exponential(nll: float) -> float:
    """Compute exp(nll), infinite where it overflows."""
    return math.exp(nll) if nll < 700 else math.inf
