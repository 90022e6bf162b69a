"""Changes of the logits that an answer asks for, and what is reported of them.

Python only: the C++ runtime has neither these penalties nor a bias nor log probabilities.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from sinkrt.errors import UsageError, problem

MAX_ANSWER_PENALTY = 2.0
MAX_BIAS = 100.0
MAX_TOP_LOGPROBS = 20
LEAST_LOGPROB = -9999.0
"""Reported for what is less likely still: JSON has no infinity. The value is OpenAI's."""


@dataclasses.dataclass(frozen=True)
class LogitParams:
    """Changes of an answer's logits, and how much is reported of them.

    presence_penalty, frequency_penalty: -2 .. 2, subtracted from the logit of each token of the answer so far: once,
    and once for each time that it has come. The prompt does not count.
    logit_bias: added to the logit, by token id, each -100 .. 100.
    top_logprobs: 0 .. 20 likeliest tokens that are reported beside the chosen one; None: nothing is reported.

    Raises: UsageError.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            _check_range(name, getattr(self, name), MAX_ANSWER_PENALTY)
        for bias in self.logit_bias.values():
            _check_range("logit_bias", bias, MAX_BIAS)
        top = self.top_logprobs
        if top is not None and (not isinstance(top, (int, np.integer)) or not 0 <= top <= MAX_TOP_LOGPROBS):
            raise UsageError(
                problem(
                    "top_logprobs", received=top, expected=f"an integer 0 .. {MAX_TOP_LOGPROBS}", fix="ask for fewer"
                )
            )


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log probability of one token of an answer, as the model gave it: before penalties, bias and temperature.

    top: the likeliest tokens and theirs, the likeliest first and equal ones by id.
    offset: characters of the answer's text before the token.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    offset: int = 0


class LogitRules:
    """The changes of one answer's logits, in the order of vLLM: bias, (repetition penalty), the answer's penalties.

    vocab_size: length of the logits.

    Raises: UsageError for a bias of a token that the model does not have.
    """

    def __init__(self, params: LogitParams, vocab_size: int) -> None:
        self._params = params
        outside = [token for token in params.logit_bias if not 0 <= token < vocab_size]
        if outside:
            raise UsageError(
                problem(
                    "logit_bias",
                    received=f"token {outside[0]}",
                    expected=f"0 .. {vocab_size - 1}",
                    fix="use ids of this model's tokenizer",
                )
            )
        self._ids = np.array(list(params.logit_bias), dtype=np.int64)
        self._bias = np.array(list(params.logit_bias.values()), dtype=np.float32)
        has_penalty = bool(params.presence_penalty or params.frequency_penalty)
        self._penalty = np.zeros(vocab_size, dtype=np.float32) if has_penalty else None
        self._counts: dict[int, int] = {}

    def biased(self, logits: npt.NDArray[np.float32], out: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits with the bias, written to `out`; the logits themselves if there is none. float32 [vocab]."""
        if not self._ids.size:
            return logits
        np.copyto(out, logits)
        out[self._ids] += self._bias
        return out

    def penalized(self, logits: npt.NDArray[np.float32], out: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits less the penalties, written to `out`, which may be `logits`; themselves if there are none."""
        return logits if self._penalty is None else np.subtract(logits, self._penalty, out=out)

    def take(self, token: int) -> None:
        """Count a token of the answer."""
        if self._penalty is not None:
            count = self._counts[token] = self._counts.get(token, 0) + 1
            self._penalty[token] = count * self._params.frequency_penalty + self._params.presence_penalty

    def report(self, logits: npt.NDArray[np.float32], token: int) -> TokenLogprob | None:
        """Log probability of a token and of the likeliest ones, if they are asked for.

        logits: float32 [vocab], as the model gave them.
        """
        top = self._params.top_logprobs
        if top is None:
            return None
        largest = float(logits.max())
        total = largest + math.log(float(np.exp(logits - np.float32(largest)).sum(dtype=np.float64)))

        def logprob(chosen: int) -> float:
            return max(float(logits[chosen]) - total, LEAST_LOGPROB)

        likeliest: list[int] = []
        if count := min(top, logits.size):
            least = np.partition(logits, -count)[-count]
            ids = np.flatnonzero(logits >= least)
            likeliest = ids[np.argsort(-logits[ids], kind="stable")][:count].tolist()
        return TokenLogprob(token, logprob(token), tuple((other, logprob(other)) for other in likeliest))


def _check_range(name: str, value: float, most: float) -> None:
    if not -most <= value <= most:  # does not hold for NaN either
        raise UsageError(
            problem(name, received=value, expected=f"a number {-most:g} .. {most:g}", fix="take one closer to 0")
        )
