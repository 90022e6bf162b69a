"""What a session needs of a backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np


class Backend(Protocol):
    """A loaded decode graph with all of its buffers, allocated once.

    ids: int64 [B, 1] and position: int64 [B], written by the session before `run`.
    logits: float32 [B, vocab], overwritten by `run`.
    states: the state tensors by input name; `run` changes them in place.
    """

    @property
    def ids(self) -> np.ndarray: ...

    @property
    def position(self) -> np.ndarray: ...

    @property
    def logits(self) -> np.ndarray: ...

    @property
    def states(self) -> Mapping[str, np.ndarray]: ...

    def run(self) -> None:
        """Decode one token a stream."""
        ...
