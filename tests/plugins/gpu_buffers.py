"""Memory on a GPU that shows what was read or written beside it, and errors of what a kernel computes."""

from __future__ import annotations

import numpy as np
import torch

GUARD = 256  # bytes before and after every buffer


class Buffer:
    """A tensor between two guards of 0xff bytes: NaN as halves and floats, so that reading them shows."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        size = int(np.prod(shape)) * dtype.itemsize
        self.whole = torch.full((2 * GUARD + (size + 15) // 16 * 16,), 0xFF, dtype=torch.uint8, device="cuda")
        self.tensor = self.whole[GUARD : GUARD + size].view(dtype).view(shape)
        self.size = size

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()

    def untouched_outside(self) -> bool:
        return bool((self.whole[:GUARD] == 0xFF).all() and (self.whole[GUARD + self.size :] == 0xFF).all())


def error(y: torch.Tensor, expected: np.ndarray) -> float:
    """|y - expected| / |expected|; NaN if any is."""
    return float(np.linalg.norm(y.double().cpu().numpy() - expected) / np.linalg.norm(expected))
