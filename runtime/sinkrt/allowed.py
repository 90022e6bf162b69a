"""Which tokens may come next, in the form that makes picking one of them cheapest."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

FEW = 1024
"""Tokens up to which they alone are looked at; with more, the others get a logit of minus infinity."""


@functools.cache
def _biases() -> npt.NDArray[np.float32]:
    """What is added to 8 logits, by the byte of their bits: float32 [256, 8], 0 for a 1 and minus infinity for a 0."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(bits, np.float32(0), np.float32(-np.inf))


@functools.cache
def _counts() -> npt.NDArray[np.int64]:
    """Bits that are set in each byte: int64 [256]."""
    return np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1).astype(np.int64)


class Allowed:
    """Some tokens of a vocabulary, at least one.

    packed: uint8, a bit for each token, the first one lowest. vocab_size: of the model; further bits do not count.
    ids: int64, the tokens if they are few. bias: float32 [vocab] to add to the logits if they are many.
    """

    def __init__(self, packed: npt.NDArray[np.uint8], vocab_size: int) -> None:
        self._packed, self._vocab_size = packed, vocab_size
        self.ids: npt.NDArray[np.int64] | None = None
        self.bias: npt.NDArray[np.float32] | None = None
        if int(_counts()[packed].sum()) <= FEW:
            self.ids = np.flatnonzero(self.mask)
        else:
            self.bias = _biases()[packed].reshape(-1)[:vocab_size]

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Whether each token may come: bool [vocab]."""
        bits = np.unpackbits(self._packed, bitorder="little")
        return bits[: self._vocab_size].view(np.bool_)
