"""Interface of drafters: what guesses the next tokens of one stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sinkrt.contract.sampling import SamplingParams


class Drafter(Protocol):
    """Guesses tokens. It knows the stream's tokens by what it is given, and keeps a bounded number of them."""

    @property
    def cost(self) -> float:
        """Time of one guessed token, in steps of the model."""
        ...

    def start(self, ids: npt.NDArray[np.int64], position: int, sampling: SamplingParams) -> None:
        """Begin with a stream whose last tokens are `ids`, int64 [N], oldest first; forget any other.

        position: of the token after them. sampling: how the model's tokens are picked, with a seed.
        """
        ...

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        """Take the tokens that follow those that are known, and guess at most `count` after them; none is fine."""
        ...

    def accepted(self, count: int) -> None:
        """Take the first `count` tokens of the last guess as the stream's; the others were wrong."""
        ...

    def close(self) -> None:
        """Release what it holds; it cannot be used afterwards."""
        ...
