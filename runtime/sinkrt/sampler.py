"""Pick the next token: greedy, temperature, top-k, top-p and repetition penalty, as transformers defines them.

The order is transformers' too: repetition penalty, temperature, top-k, top-p. Twin of
runtime/cpp/include/sinkrt/sampler.h, which picks the same tokens. `LogitRules` are Python only.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sinkrt.allowed import Allowed
from sinkrt.contract.sampling import MAX_PENALTY, MAX_TOP_K, MIN_PENALTY, SEED_LIMIT, SamplingParams
from sinkrt.errors import BackendError, UsageError, problem
from sinkrt.logit_rules import LogitRules

__all__ = [
    "MAX_PENALTY",
    "MAX_TOP_K",
    "MIN_PENALTY",
    "SEED_LIMIT",
    "Sampler",
    "SamplingParams",
    "candidates",
    "penalized",
]

FIRST_CANDIDATES = 1024
"""Tokens that top-p sorts at first: sorting a whole vocabulary costs more than the model's own small operators."""

_SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)
"""Anything below is greedy as well, and would be 0 in float32."""


class Sampler:
    """Sampler of one stream. It holds no history: the pick depends on its arguments, the rules and the seed alone.

    vocab_size: length of the logits. draw: gives a number in [0, 1) for seed and position; None: `uniform`.
    rules: further changes of the logits; None: there are none.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        draw: Callable[[int, int], float] | None = None,
        rules: LogitRules | None = None,
    ) -> None:
        self._params = params
        self._rules = rules
        self._draw = draw or uniform
        self._seed = secrets.randbits(64) if params.seed is None else params.seed
        self._scratch = np.empty(vocab_size, dtype=np.float32)

    def sample(
        self,
        logits: npt.NDArray[np.float32],
        recent: npt.NDArray[np.int64],
        position: int,
        allowed: Allowed | None = None,
    ) -> int:
        """The token that follows.

        logits: float32 [vocab], left as they are. recent: int64 [N], tokens for the repetition penalty; negative
        entries are none. position: where in the stream the new token will lie. With the same seed, the random draw
        depends on the position only, so a stream that is saved and loaded goes on as if nothing had happened.
        allowed: tokens to pick from; None: all.

        Raises: BackendError if the logits are not numbers; UsageError if the penalty makes them so large.
        """
        params = self._params
        best = int(logits.argmax())  # a NaN counts as the largest
        if not math.isfinite(logits[best]):
            raise BackendError(
                problem(
                    "logits",
                    received=logits[best],
                    expected="finite numbers",
                    fix="reset the stream; if this is an fp16 bundle that overflows, export with --dtype fp32",
                )
            )
        ids = None if allowed is None else allowed.ids
        if params.repetition_penalty != 1.0 or self._rules is not None or allowed is not None:
            with np.errstate(over="ignore"):  # looked for below
                logits = self._changed(logits, recent)
            if ids is not None:
                logits = logits[ids]
            elif allowed is not None and allowed.bias is not None:
                logits = np.add(logits, allowed.bias, out=self._scratch)
            best = int(logits.argmax())
            if not math.isfinite(logits[best]):  # the model's numbers are fine: so is its stream
                raise UsageError(
                    problem(
                        "repetition_penalty",
                        received=params.repetition_penalty,
                        expected="one that keeps these logits finite",
                        fix="take one that is closer to 1",
                    )
                )
        if params.temperature == 0:
            return best if ids is None else int(ids[best])
        chosen, weights = candidates(logits, params, self._scratch[: logits.size])
        cumulative = np.cumsum(weights, dtype=np.float64)
        pick = int(np.searchsorted(cumulative, self._draw(self._seed, position) * cumulative[-1], side="right"))
        # Rounding may carry the scaled draw up to the sum itself: then the last token of any weight is meant.
        last = int(chosen[min(pick, int(np.searchsorted(cumulative, cumulative[-1])))])
        return last if ids is None else int(ids[last])

    def _changed(self, logits: npt.NDArray[np.float32], recent: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Logits after bias and penalties, in the scratch memory or as they are."""
        if self._rules is not None:
            logits = self._rules.biased(logits, self._scratch)
        if self._params.repetition_penalty != 1.0:
            logits = penalized(logits, recent, self._params.repetition_penalty, self._scratch)
        return logits if self._rules is None else self._rules.penalized(logits, self._scratch)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for this seed and position: a counter-based generator needs no state."""
    bits = int(np.random.Philox(key=seed, counter=position).random_raw())
    return (bits >> 11) * 2.0**-53


def penalized(
    logits: npt.NDArray[np.float32], recent: npt.NDArray[np.int64], penalty: float, out: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Logits with those of `recent` tokens divided by `penalty` if positive and multiplied if not, written to `out`."""
    np.copyto(out, logits)
    seen = recent[recent >= 0]
    values = logits[seen]
    out[seen] = np.where(values < 0, values * penalty, values / penalty)  # a token seen twice is penalized once
    return out


def candidates(
    logits: npt.NDArray[np.float32], params: SamplingParams, out: npt.NDArray[np.float32] | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Token ids [N] and their weights float32 [N] > 0 up to a common factor, after temperature, top-k and top-p.

    The likeliest token weighs 1. Ties at rank k are all kept. `params.temperature` must be above 0.
    `out`: float32 [vocab] scratch, which may be `logits` itself and may come back as the weights.
    """
    out = np.empty_like(logits) if out is None else out
    # The maximum first: a temperature close to 0 would overflow otherwise.
    np.subtract(logits, logits.max(), out=out)
    with np.errstate(over="ignore"):  # far below the maximum, which is exp(-inf) = 0
        np.divide(out, max(params.temperature, _SMALLEST_TEMPERATURE), out=out, casting="same_kind")
    if 0 < params.top_k < out.size:
        kth = np.partition(out, -params.top_k)[-params.top_k]
        ids = np.flatnonzero(out >= kth)
        weights = np.exp(out[ids])
    else:
        ids = np.arange(out.size)
        weights = np.exp(out, out=out)
    if params.top_p < 1.0:
        keep = _nucleus(weights, params.top_p)
        ids, weights = ids[keep], weights[keep]
    return ids, weights


def _nucleus(weights: npt.NDArray[np.float32], top_p: float) -> npt.NDArray[np.int64]:
    """Indices of the fewest largest weights whose share of the sum reaches `top_p`."""
    goal = top_p * float(weights.sum(dtype=np.float64))
    count = min(FIRST_CANDIDATES, weights.size)
    while True:
        # Equal weights by id, here and where `count` cuts: another runtime then picks the same.
        least = np.partition(weights, -count)[-count]
        top = np.flatnonzero(weights >= least)
        top = top[np.argsort(-weights[top], kind="stable")]
        cumulative = np.cumsum(weights[top], dtype=np.float64)
        if cumulative[-1] >= goal or count == weights.size:
            # A token stays if those before it do not reach the goal by themselves: the first one always does.
            return top[: int(np.searchsorted(cumulative, goal)) + 1]
        count = min(count * 8, weights.size)
