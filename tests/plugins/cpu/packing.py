"""Packed weights of kernels/linear.h, written from the layout's definition, one index at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TILE = 16
WEIGHT_TYPES = ("float32", "bfloat16", "int8", "int4")
"""Numbers of WeightType."""


@dataclass(frozen=True)
class Weight:
    """One matrix, packed, and what it means.

    values: float64 [rows, K], scale * (value - zero) as the kernel reads it
    whole: int64 [rows, K], value - zero; None for floating point
    scales: float64 [rows, blocks]; None for floating point
    """

    kind: str
    block_size: int
    values: np.ndarray
    whole: np.ndarray | None
    scales: np.ndarray | None
    packed: np.ndarray
    packed_scales: np.ndarray | None
    packed_zeros: np.ndarray | None


def padded(array: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Zeros after the rows and columns, up to multiples."""
    missing = [(0, -array.shape[0] % rows), (0, -array.shape[1] % columns)]
    return np.pad(array, missing)


def tiles(array: np.ndarray, step: int) -> np.ndarray:
    """[rows, K] to [tiles, K / step, 16, step]."""
    rows, columns = array.shape
    return np.ascontiguousarray(array.reshape(rows // TILE, TILE, columns // step, step).transpose(0, 2, 1, 3))


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16's bits, to nearest even; finite numbers only."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def float_weight(kind: str, values: np.ndarray) -> Weight:
    """A matrix of float32 or bfloat16 [rows, K]."""
    if kind == "float32":
        packed = tiles(padded(values.astype(np.float32), TILE, 1), 1)
        return Weight(kind, 0, values.astype(np.float32).astype(np.float64), None, None, packed, None, None)
    bits = to_bfloat16(values)
    exact = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return Weight(kind, 0, exact, None, None, tiles(padded(bits, TILE, 2), 2), None, None)


def int_weight(
    kind: str, values: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, block_size: int, scale_dtype: type
) -> Weight:
    """A matrix of int8 or int4 [rows, K] with scales and zero points [rows, blocks].

    values: stored numbers, -127 .. 127 or 0 .. 15
    zeros: 0 .. 15; None: 8 for int4, 0 for int8
    """
    columns = values.shape[1]
    scales = scales.astype(scale_dtype)
    block = block_size or columns
    middle = 8 if kind == "int4" else 0
    offsets = np.full_like(scales, middle, dtype=np.int64) if zeros is None else zeros.astype(np.int64)
    whole = values.astype(np.int64) - np.repeat(offsets, block, axis=1)[:, :columns]
    exact = whole * np.repeat(scales.astype(np.float64), block, axis=1)[:, :columns]
    full = padded(values.astype(np.int64), TILE, block_size or 4)
    if kind == "int8":
        packed = tiles(full, 4).astype(np.int8)
    else:
        eights = tiles(full, 8)
        packed = (eights[..., :4] | eights[..., 4:] << 4).astype(np.uint8)
    packed_zeros = None if zeros is None else tiles(padded(zeros.astype(np.uint8), TILE, 1), 1)
    packed_scales = tiles(padded(scales, TILE, 1), 1)
    return Weight(kind, block_size, exact, whole, scales.astype(np.float64), packed, packed_scales, packed_zeros)


def random_weight(
    rng: np.random.Generator,
    kind: str,
    rows: int,
    columns: int,
    block_size: int = 0,
    has_zeros: bool = False,
    scale_dtype: type = np.float32,
) -> Weight:
    """Normal numbers, or any integers of the type with scales between 0.5 and 1.5."""
    if kind in {"float32", "bfloat16"}:
        return float_weight(kind, rng.standard_normal((rows, columns)))
    blocks = -(-columns // block_size) if block_size else 1
    low, high = (-127, 128) if kind == "int8" else (0, 16)
    values = rng.integers(low, high, (rows, columns))
    zeros = rng.integers(0, 16, (rows, blocks)) if has_zeros else None
    return int_weight(kind, values, rng.uniform(0.5, 1.5, (rows, blocks)) / 64, zeros, block_size, scale_dtype)


def alternating(gate: Weight, up: Weight) -> dict[str, np.ndarray | None]:
    """Packed arrays of gate and up with their tiles in turns."""

    def turns(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
        if first is None or second is None:
            return None
        return np.stack([first, second], axis=1).reshape(-1, *first.shape[1:])

    return {
        "weight": turns(gate.packed, up.packed),
        "scale": turns(gate.packed_scales, up.packed_scales),
        "zero_point": turns(gate.packed_zeros, up.packed_zeros),
    }
