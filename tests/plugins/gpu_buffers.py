"""Memory that shows what was read or written beside it, and errors of what a kernel computes."""

from __future__ import annotations

import numpy as np
import torch

GUARD = 256  # bytes before and after every buffer


class Buffer:
    """A tensor between two guards, all bytes 0xff: NaN as halves and floats, so that reading them shows."""

    def __init__(self, *shape: int, dtype: torch.dtype, device: str = "cuda") -> None:
        size = dtype.itemsize * torch.Size(shape).numel()
        self._whole = torch.full((2 * GUARD + -(-size // 16) * 16,), 0xFF, dtype=torch.uint8, device=device)
        self._size = size
        self.tensor = self._whole[GUARD : GUARD + size].view(dtype).view(shape)

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()

    def poison(self) -> None:
        self._whole.fill_(0xFF)

    def bits(self) -> torch.Tensor:
        return self._whole[GUARD : GUARD + self._size].clone()

    def is_untouched_outside(self) -> bool:
        return bool((self._whole[:GUARD] == 0xFF).all() and (self._whole[GUARD + self._size :] == 0xFF).all())


def error(y: torch.Tensor, expected: np.ndarray) -> float:
    """|y - expected| / |expected|; NaN if any is."""
    return float(np.linalg.norm(y.double().cpu().numpy() - expected) / np.linalg.norm(expected))
