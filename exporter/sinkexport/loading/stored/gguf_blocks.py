"""Integers of GGUF's block types that have scales and no minima: Q8_0, Q4_0, Q5_0, Q6_K and Q3_K.

Types with minima (Q4_1, Q5_1, Q2_K, Q4_K, Q5_K) have w = scale * integer + minimum, and the minimum is no whole number
of scales: no zero point stands for it. They are dequantised, and so are all others.

Source: llama.cpp, ggml/src/ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from sinkexport.loading.checkpoints.file_tensor import Floats, Indices, QuantizedFileTensor
from sinkexport.loading.stored.tensors import ComputedTensor, computed, stored
from sinkexport.quant.stored import StoredMatrix
from sinkexport.quant.weight import Rounded

SUPER = 256
"""Numbers of a block of the K types."""

Blocks = npt.NDArray[np.uint8]


class _Type(NamedTuple):
    """bits, size: of the integers, and how many share a scale. read: blocks [n, bytes] -> int8 [n, numbers], scales."""

    bits: Literal[4, 8]
    size: int
    read: Callable[[Blocks], tuple[npt.NDArray[np.int8], Floats]]


def gguf_tensor(tensor: QuantizedFileTensor) -> ComputedTensor:
    """A tensor of a GGUF file as its integers, or, where it has none that stand alone, as what it is dequantised to."""
    found = TYPES.get(tensor.dtype)
    rows, depth = tensor.matrix_shape
    if found is None:

        def numbers(indices: Indices | None) -> Floats:
            return tensor.rows(np.arange(rows) if indices is None else indices)

        return computed(tensor.name, tensor.file, tensor.shape, f"GGUF {tensor.dtype}", numbers)
    matrix = StoredMatrix(
        name=tensor.name,
        shape=(rows, depth),
        bits=found.bits,
        block_size=None if found.size == depth else found.size,
        symmetric=True,
        read=functools.partial(_read, tensor, found),
        kind=f"GGUF {tensor.dtype}",
    )
    return stored(tensor.file, matrix)


def _read(tensor: QuantizedFileTensor, found: _Type, rows: Indices | None) -> Rounded:
    count, depth = tensor.matrix_shape
    lines = tensor.array().reshape(count, -1)
    lines = np.ascontiguousarray(lines if rows is None else lines[rows])
    integers, scales = found.read(lines.reshape(-1, tensor.block[1]))
    return Rounded(integers.reshape(len(lines), depth), scales.reshape(len(lines), -1), None)


def _half(blocks: Blocks) -> Floats:
    """float32 [n, 1] of two bytes each."""
    return np.ascontiguousarray(blocks).view(np.float16).astype(np.float32)


def _q8_0(blocks: Blocks) -> tuple[npt.NDArray[np.int8], Floats]:
    return blocks[:, 2:].view(np.int8), _half(blocks[:, :2])


def _q4_0(blocks: Blocks) -> tuple[npt.NDArray[np.int8], Floats]:
    codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    return codes.astype(np.int8) - np.int8(8), _half(blocks[:, :2])


def _q5_0(blocks: Blocks) -> tuple[npt.NDArray[np.int8], Floats]:
    fifth = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little")
    codes = np.concatenate([blocks[:, 6:] & 15, blocks[:, 6:] >> 4], axis=1) | (fifth << 4)
    return codes.astype(np.int8) - np.int8(16), _half(blocks[:, :2])


def _q6_k(blocks: Blocks) -> tuple[npt.NDArray[np.int8], Floats]:
    low, high = blocks[:, :128].reshape(-1, 2, 1, 64), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    four = (low >> np.array((0, 4), np.uint8)[:, None] & 15).reshape(-1, SUPER)
    two = (high >> np.array((0, 2, 4, 6), np.uint8)[:, None] & 3).reshape(-1, SUPER)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (four | two << 4).astype(np.int8) - np.int8(32), _half(blocks[:, 208:]) * scales


def _q3_k(blocks: Blocks) -> tuple[npt.NDArray[np.int8], Floats]:
    third = np.unpackbits(blocks[:, :32, None], axis=2, bitorder="little").swapaxes(1, 2).reshape(-1, SUPER)
    low = blocks[:, 32:96].reshape(-1, 2, 1, 32)
    two = (low >> np.array((0, 2, 4, 6), np.uint8)[:, None] & 3).reshape(-1, SUPER)
    packed = blocks[:, 96:108]
    four = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    upper = (packed[:, None, 8:] >> np.array((0, 2, 4, 6), np.uint8)[:, None] & 3).reshape(-1, 16)
    scales = (four | upper << 4).astype(np.int8) - np.int8(32)
    return two.astype(np.int8) - np.int8(4) * (1 - third).astype(np.int8), _half(blocks[:, 108:]) * scales


TYPES: Mapping[str, _Type] = {
    "Q8_0": _Type(8, 32, _q8_0),
    "Q4_0": _Type(4, 32, _q4_0),
    "Q5_0": _Type(8, 32, _q5_0),
    "Q6_K": _Type(8, 16, _q6_k),
    "Q3_K": _Type(4, 16, _q3_k),
}
"""Types whose numbers are integers times scales, by GGUF's names."""
