"""Quality of a quantised bundle: its predictions compared with those in floating point.

Rounded weights change every logit, so a tolerance for logits says nothing about a quantised bundle. Its predictions are
compared instead, over a text and past the first eviction: Kullback-Leibler divergence, top-1 agreement and both
perplexities. Needs no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from sinkrt.errors import BackendError, problem

from sinkexport.evaluation.perplexity import Ids, Predictor, exponential, standard_error
from sinkexport.util.progress import Report, silent

Floats = npt.NDArray[np.float64]
BLOCK_TOKENS = 32
"""Predictions that are compared at a time. The floating-point side is so many ahead: 32 of 50,000 logits are 6 MB."""

SEGMENT_TOKENS = 256
"""Length of a segment for the standard error: segments count as independent, as in `perplexity`."""


@dataclasses.dataclass(frozen=True)
class Quality:
    """Predictions P in floating point and Q of the bundle, over one text.

    num_tokens: predicted tokens. kl_divergence: mean KL(P || Q), nats a token.
    worst_kl_divergence: the largest one, of the prediction of token `worst_token`.
    top1_agreement: share of tokens for which P and Q have the same most likely token.
    reference_perplexity, perplexity: of P and Q. perplexity_increase: of Q's over P's, 0.01 for 1%.
    standard_error: of the increase, from its spread over segments; None with fewer than two.
    """

    num_tokens: int
    kl_divergence: float
    worst_kl_divergence: float
    worst_token: int
    top1_agreement: float
    reference_perplexity: float
    perplexity: float
    perplexity_increase: float
    standard_error: float | None


def compare_predictions(reference: Predictor, bundle: Predictor, ids: Ids, report: Report = silent) -> Quality:
    """Compare predictions of the tokens 1 .. N-1 of ids [N]; the reference runs a block ahead.

    Raises: BackendError that names the first prediction that is not a number; what either predictor raises.
    """
    total = len(ids) - 1
    kl, increase, reference_nll = np.empty(total), np.empty(total), np.empty(total)  # nats, by predicted token
    agreed, done = 0, 0
    report("quality", 0, total)
    # Closed from the inside out: the thread ends before what it runs.
    with contextlib.closing(_blocks(reference)) as slow, contextlib.closing(_ahead(slow)) as ready:
        for want, got in zip(ready, _blocks(bundle), strict=True):  # [n, vocab] each
            rows = slice(done, done + len(want))
            targets = ids[1:][rows, None]
            log_p = _log_probabilities(want, reference, done)
            log_q = _log_probabilities(got, bundle, done)
            reference_nll[rows] = -np.take_along_axis(log_p, targets, axis=-1)[:, 0]
            increase[rows] = -np.take_along_axis(log_q, targets, axis=-1)[:, 0] - reference_nll[rows]
            kl[rows] = kl_divergence(log_p, log_q)
            agreed += int((want.argmax(axis=-1) == got.argmax(axis=-1)).sum())
            done += len(want)
            report("quality", done, total)
    starts = np.arange(0, total, SEGMENT_TOKENS)
    ratio = exponential(increase.mean())
    return Quality(
        num_tokens=total,
        kl_divergence=float(kl.mean()),
        worst_kl_divergence=float(kl.max()),
        worst_token=int(kl.argmax()) + 1,
        top1_agreement=agreed / total,
        reference_perplexity=exponential(reference_nll.mean()),
        perplexity=exponential(reference_nll.mean() + increase.mean()),
        perplexity_increase=ratio - 1,
        standard_error=standard_error(np.diff(starts, append=total) * 1.0, np.add.reduceat(increase, starts)),
    )


def kl_divergence(log_p: Floats, log_q: Floats) -> Floats:
    """Compute KL(P || Q) of each row, nats. log_p, log_q: [n, vocab], log-probabilities. Returns: float64 [n], >= 0.

    A token that P rules out adds nothing; one that only Q rules out makes it infinite.
    """
    p = np.exp(log_p)
    terms = np.where(p > 0, p * (np.where(p > 0, log_p, 0.0) - np.where(p > 0, log_q, 0.0)), 0.0)
    return np.maximum(terms.sum(axis=-1), 0.0)  # equal rows can round to -1e-17


def _blocks(predictor: Predictor) -> Generator[npt.NDArray[Any], None, None]:
    """Yield copies of all predictions in order, `BLOCK_TOKENS` at a time: [n, vocab]."""
    rows = (row.copy() for prediction in predictor.predictions() for row in prediction.logits)
    while block := list(itertools.islice(rows, BLOCK_TOKENS)):
        yield np.stack(block)


def _ahead(items: Generator[npt.NDArray[Any], None, None]) -> Generator[npt.NDArray[Any], None, None]:
    """Yield the same items; while one is in use, a thread makes the next."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = pool.submit(next, items, None)
            yield item


def _log_probabilities(logits: npt.NDArray[Any], predictor: Predictor, first: int) -> Floats:
    """Compute log softmax of each row in float64. logits: [n, vocab], predictions of tokens first + 1, first + 2, ..

    Raises: BackendError that names the first row with a value that is not a number.
    """
    block = logits.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        block -= block.max(axis=-1, keepdims=True)
        block -= np.log(np.exp(block).sum(axis=-1, keepdims=True))
    if (bad := np.isnan(block).any(axis=-1)).any():
        raise BackendError(
            problem(
                f"{predictor.name}: prediction of token {first + 1 + int(bad.argmax())}",
                received="logits that are not numbers",
                expected="finite logits",
                fix="check the weights, or use fp32",
            )
        )
    return block
