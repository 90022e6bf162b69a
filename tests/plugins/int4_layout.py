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


def integers(packed: torch.Tensor, num_outputs: int, num_inputs: int) -> torch.Tensor:
    """uint8 [.., tiles, tiles along K, 512] -> uint8 [.., N, K] of 0 .. 15."""
    *leading, rows, steps, _ = packed.shape
    whole = torch.empty(*leading, rows, steps, TILE, DEPTH, dtype=torch.uint8)
    whole[..., NEAR, INPUT], whole[..., NEAR + 8, INPUT] = packed & 15, packed >> 4
    return whole.transpose(-3, -2).reshape(*leading, rows * TILE, steps * DEPTH)[..., :num_outputs, :num_inputs]


def by_output(values: torch.Tensor, num_outputs: int) -> torch.Tensor:
    """[.., tiles, G, 16], scales or zero points -> [.., N, G]."""
    ordered = torch.empty_like(values)
    ordered[..., ORDER] = values
    return ordered.transpose(-1, -2).flatten(-3, -2)[..., :num_outputs, :]


def dense(
    packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, shape: tuple[int, int], block: int
) -> torch.Tensor:
    """float64 [.., N, K]: what weights in this layout stand for."""
    num_outputs, num_inputs = shape

    def by_input(values: torch.Tensor) -> torch.Tensor:
        return by_output(values, num_outputs).double().repeat_interleave(block, -1)[..., :num_inputs]

    offset = 8.0 if zeros is None else by_input(zeros)
    return (integers(packed, num_outputs, num_inputs).double() - offset) * by_input(scales)
