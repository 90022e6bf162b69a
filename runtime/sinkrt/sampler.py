"""Pick the next token: greedy, temperature, top-k, top-p and repetition penalty, as transformers defines them."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from sinkrt.contract import Manifest
from sinkrt.errors import UsageError, problem


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    temperature: 0 is greedy. top_k: keep the k likeliest tokens (0: all). top_p: keep the smallest set whose
    probability reaches p (arXiv:1904.09751). repetition_penalty: > 1 makes tokens of the cache's reach less likely
    (arXiv:1909.05858). seed: None draws one.

    Raises: UsageError.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", self.temperature, ">= 0")
        _require(self.top_k >= 0, "top_k", self.top_k, ">= 0 (0: all tokens)")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(
            math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty", self.repetition_penalty, "> 0 (1: none)",
        )  # fmt: skip
        _require(self.seed is None or self.seed >= 0, "seed", self.seed, ">= 0")


class Sampler:
    """Samples one stream. Remembers as many tokens as the cache holds, so its memory is constant too."""

    def __init__(self, params: SamplingParams, manifest: Manifest) -> None:
        self._params = params
        self._recent: deque[int] = deque(maxlen=manifest.stream.capacity)
        self._random = np.random.default_rng(params.seed)

    def observe(self, tokens: Iterable[int]) -> None:
        """Count tokens that were fed, a prompt's say, for the repetition penalty."""
        self._recent.extend(int(token) for token in tokens)

    def sample(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token of float32 [vocab] logits, which are left as they are."""
        params = self._params
        if params.repetition_penalty != 1.0 and self._recent:
            logits = logits.copy()
            seen = np.unique(np.fromiter(self._recent, dtype=np.int64))
            values = logits[seen]
            logits[seen] = np.where(values < 0, values * params.repetition_penalty, values / params.repetition_penalty)
        token = int(logits.argmax()) if params.temperature == 0 else self._draw(logits)
        self._recent.append(token)
        return token

    def _draw(self, logits: npt.NDArray[np.float32]) -> int:
        probabilities = token_probabilities(logits, self._params)
        return int(self._random.choice(probabilities.size, p=probabilities))


def token_probabilities(logits: npt.NDArray[np.float32], params: SamplingParams) -> npt.NDArray[np.float64]:
    """float64 [vocab] probabilities after temperature, top-k and top-p, in that order. Ties at the k-th are kept."""
    scaled = logits.astype(np.float64) / params.temperature
    if 0 < params.top_k < scaled.size:
        kth = np.partition(scaled, -params.top_k)[-params.top_k]
        scaled[scaled < kth] = -np.inf
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    if params.top_p < 1.0:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= params.top_p]] = 0.0
        probabilities /= probabilities.sum()
    return probabilities


def _require(ok: bool, what: str, received: object, expected: str) -> None:
    if not ok:
        raise UsageError(problem(what, received=received, expected=expected, fix=f"change {what}"))
