"""The layout of INT4 weights as kernels/linear.h states it, byte by byte."""

from __future__ import annotations

import torch

TILE, DEPTH = 16, 64  # outputs x inputs of a tile
BYTES = torch.arange(TILE * DEPTH // 2)
NEAR = BYTES // 64  # output in the low nibble; in the high one it is 8 more
INPUT = 32 * (BYTES // 8 % 2) + 8 * (BYTES // 16 % 4) + 4 * (BYTES // 4 % 2) + torch.tensor([0, 2, 1, 3])[BYTES % 4]
ORDER = torch.arange(TILE).view(2, 8).T.flatten()  # of scales: 0, 8, 1, 9, ..


def padded(values: torch.Tensor, rows: int, columns: int, filler: int) -> torch.Tensor:
    """[.., N, K] -> the same with N and K up to multiples, `filler` in what is new."""
    missing = (-values.shape[-1] % columns, -values.shape[-2] % rows)
    return torch.nn.functional.pad(values, (0, missing[0], 0, missing[1]), value=filler)


def tiles(integers: torch.Tensor) -> torch.Tensor:
    """uint8 [.., N, K] of 0 .. 15 -> uint8 [.., tiles, tiles along K, 512]. Padding is 5: it must not matter."""
    whole = padded(integers, TILE, DEPTH, 5)
    *leading, rows, columns = whole.shape
    parts = whole.view(*leading, rows // TILE, TILE, columns // DEPTH, DEPTH).transpose(-3, -2)
    return parts[..., NEAR, INPUT] | (parts[..., NEAR + 8, INPUT] << 4)


def groups(values: torch.Tensor) -> torch.Tensor:
    """[.., N, G], scales or zero points -> [.., tiles, G, 16]."""
    whole = padded(values, TILE, 1, 1)
    *leading, rows, count = whole.shape
    return whole.view(*leading, rows // TILE, TILE, count).transpose(-1, -2)[..., ORDER]
