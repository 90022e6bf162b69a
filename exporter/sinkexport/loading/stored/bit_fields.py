"""Integers of a few bits that lie side by side in larger ones, the lowest bits first."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def unpacked(words: npt.NDArray[Any], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """uint8 [n, count] of words [n, m], whose fields of `bits` bits follow each other without gaps.

    Fields of 3 bits may cross from one word into the next.
    """
    in_bytes = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)
    if bits == 8:
        fields = in_bytes
    elif bits == 4:
        fields = np.stack((in_bytes & 15, in_bytes >> 4), axis=-1)
    else:
        weights = 1 << np.arange(bits, dtype=np.uint8)
        single = np.unpackbits(in_bytes, axis=1, bitorder="little")
        whole = single[:, : single.shape[1] // bits * bits].reshape(len(words), -1, bits)
        fields = (whole * weights).sum(axis=-1, dtype=np.uint8)
    return fields.reshape(len(words), -1)[:, :count]
