"""Pick the next token: greedy, temperature, top-k, top-p and repetition penalty, as transformers defines them.

The order is transformers' too: repetition penalty, temperature, top-k, top-p. Twin of
runtime/cpp/include/sinkrt/sampler.h, which picks the same tokens.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sinkrt.errors import BackendError, UsageError, problem

SEED_LIMIT = 2**64
MAX_TEMPERATURE = 100.0
MAX_TOP_K = 2**31 - 1
MIN_PENALTY, MAX_PENALTY = 0.01, 100.0
"""Beyond these, the logits of real models overflow float32 or lose all their differences."""

FIRST_CANDIDATES = 1024
"""Tokens that top-p sorts at first: sorting a whole vocabulary costs more than the model's own small operators."""

_SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)
"""Anything below is greedy as well, and would be 0 in float32."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    temperature: 0 .. 100, 0 is greedy. top_k: keep the k likeliest tokens (0: all). top_p: in (0, 1], keep the smallest
    set whose probability reaches p (arXiv:1904.09751). repetition_penalty: 0.01 .. 100, > 1 makes tokens of the
    cache's reach less likely (arXiv:1909.05858). seed: 0 .. 2^64-1; None draws one.

    Raises: UsageError.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require_number("temperature", self.temperature, 0, MAX_TEMPERATURE, "0 .. 100 (0: greedy)")
        _require_integer("top_k", self.top_k, MAX_TOP_K, f"0 .. {MAX_TOP_K} (0: all tokens)")
        _require_number("top_p", self.top_p, math.ulp(0.0), 1, "a number in (0, 1]")
        _require_number(
            "repetition_penalty",
            self.repetition_penalty,
            MIN_PENALTY,
            MAX_PENALTY,
            f"{MIN_PENALTY} .. {MAX_PENALTY:.0f} (1: none)",
        )
        if self.seed is not None:
            _require_integer("seed", self.seed, SEED_LIMIT - 1, f"0 .. {SEED_LIMIT - 1}")


class Sampler:
    """Sampler of one stream. It holds no history: the pick depends on its arguments and the seed alone.

    vocab_size: length of the logits. draw: gives a number in [0, 1) for seed and position; None: `uniform`.
    """

    def __init__(
        self, params: SamplingParams, vocab_size: int, draw: Callable[[int, int], float] | None = None
    ) -> None:
        self._params = params
        self._draw = draw or uniform
        self._seed = secrets.randbits(64) if params.seed is None else params.seed
        self._scratch = np.empty(vocab_size, dtype=np.float32)

    def sample(self, logits: npt.NDArray[np.float32], recent: npt.NDArray[np.int64], position: int) -> int:
        """The token that follows.

        logits: float32 [vocab], left as they are. recent: int64 [N], tokens for the repetition penalty; negative
        entries are none. position: where in the stream the new token will lie. With the same seed, the random draw
        depends on the position only, so a stream that is saved and loaded goes on as if nothing had happened.

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
        if params.repetition_penalty != 1.0:
            with np.errstate(over="ignore"):  # looked for below
                logits = penalized(logits, recent, params.repetition_penalty, self._scratch)
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
            return best
        ids, weights = candidates(logits, params, self._scratch)
        cumulative = np.cumsum(weights, dtype=np.float64)
        pick = int(np.searchsorted(cumulative, self._draw(self._seed, position) * cumulative[-1], side="right"))
        # Rounding may carry the scaled draw up to the sum itself: then the last token of any weight is meant.
        return int(ids[min(pick, int(np.searchsorted(cumulative, cumulative[-1])))])


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


def _require_number(what: str, value: object, least: float, most: float, expected: str) -> None:
    # Compared, not converted: an integer may be too large for a float. No comparison holds for NaN.
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not least <= value <= most:
        raise UsageError(problem(what, received=_shown(value), expected=expected, fix=f"change {what}"))


def _require_integer(what: str, value: object, most: int, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value <= most:
        raise UsageError(problem(what, received=_shown(value), expected=expected, fix=f"change {what}"))


def _shown(value: object) -> str:
    if isinstance(value, int) and abs(value) >= 10**30:  # Python refuses to write the longest ones
        return "a huge number"
    return str(value) if isinstance(value, (int, float, np.number)) else repr(value)[:60]
