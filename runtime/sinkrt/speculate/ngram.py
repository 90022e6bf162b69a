"""Prompt lookup: a text that repeats itself goes on as it did before. Needs no model.

Source: Saxena, "Prompt Lookup Decoding" (2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sinkrt.contract.sampling import SamplingParams

LENGTHS = (5, 3)
"""Tokens at the end of the stream that are looked for, longest first. Two alone are found too often: with SmolLM2-135M
guesses after a match of two were right a third as often."""

MAX_IDS = 2**15
"""Tokens that are kept: of more, the older half is forgotten."""


class NgramDrafter:
    """Implements `Drafter` with a hash index: of each run of `lengths` tokens, where it was last followed by another.

    max_ids: tokens kept, which bounds the memory: about 15 MB for 2^15.
    """

    def __init__(self, lengths: Sequence[int] = LENGTHS, max_ids: int = MAX_IDS) -> None:
        self._lengths, self._max_ids = tuple(lengths), max_ids
        self._guess: list[int] = []
        self._forget()

    @property
    def cost(self) -> float:
        return 0.0

    def start(self, ids: npt.NDArray[np.int64], position: int, sampling: SamplingParams) -> None:  # noqa: ARG002
        found = ids.tolist()
        if found and self._ids[-len(found) :] == found:  # the stream that is known already
            return
        self._forget()
        self._take(found)

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        self._take(ids)
        known, self._guess = self._ids, []
        for length, index in self._index.items():
            if len(known) >= length and (at := index.get(tuple(known[-length:]))) is not None:
                period = len(known) - at  # a match that reaches the end goes on with itself
                self._guess = [known[at + i % period] for i in range(count)]
                break
        return self._guess

    def accepted(self, count: int) -> None:
        self._take(self._guess[:count])
        self._guess = []

    def close(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._ids: list[int] = []
        self._index: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in self._lengths}

    def _take(self, ids: Sequence[int]) -> None:
        known = self._ids
        for token in ids:
            end = len(known)
            for length, index in self._index.items():
                if end >= length:
                    index[tuple(known[end - length :])] = end
            known.append(token)
        if len(known) > self._max_ids:
            kept = known[-self._max_ids // 2 :]
            self._forget()
            self._take(kept)
