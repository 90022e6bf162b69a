"""One tensor of a weight file, read a few rows and columns at a time, without the loader that a model comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

FLOATING = frozenset(("F64", "F32", "F16", "BF16"))
"""Element types that hold weights as they are: all others need scales, which are tensors of their own."""

SAMPLED_COLUMNS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class FileTensor:
    """A tensor as it lies in a file.

    dtype: of its elements, in safetensors' words (``F32``, ``BF16`` ..), or a GGUF quantisation type. file: its name.
    array: gives it as a NumPy array of `shape`; a view of the file where that can be.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    array: Callable[[], npt.NDArray[Any]]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and their length; each number of a vector is a row."""
        if len(self.shape) < 2:
            return int(np.prod(self.shape, dtype=np.int64)), 1
        return int(np.prod(self.shape[:-1], dtype=np.int64)), self.shape[-1]

    @property
    def size(self) -> int:
        """Numbers in it."""
        return int(np.prod(self.shape, dtype=np.int64))

    def rows(self, indices: Indices) -> Floats:
        """float32 [len(indices), length of a row]."""
        return np.asarray(self.array().reshape(self.matrix_shape)[indices], np.float32)

    def columns(self, indices: Indices) -> Floats:
        """float32 [rows, len(indices)]."""
        return np.asarray(self.array().reshape(self.matrix_shape)[:, indices], np.float32)

    def sampled_columns(self) -> Indices:
        """Columns that are cheap to read of all rows."""
        width = self.matrix_shape[1]
        return np.unique(np.linspace(0, width - 1, SAMPLED_COLUMNS).astype(np.int64))

    def flattened(self) -> FileTensor:
        """The same as a vector."""
        return FileTensor(
            name=self.name, shape=(self.size,), dtype=self.dtype, file=self.file, array=lambda: self.array().reshape(-1)
        )

    def reordered(self, order: Indices) -> FileTensor:
        """The same with its rows in another order: row i is row order[i] of this."""
        return ReorderedTensor(
            name=self.name,
            shape=self.shape,
            dtype=self.dtype,
            file=self.file,
            array=self.array,
            source=self,
            order=order,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ZeroBias(FileTensor):
    """Zeros that a quantising program saves as the bias of every matrix, whether the model has one there or not."""


@dataclasses.dataclass(frozen=True, eq=False)
class ReorderedTensor(FileTensor):
    """A tensor whose rows are those of `source`, in another order."""

    source: FileTensor
    order: Indices

    def rows(self, indices: Indices) -> Floats:
        """float32 [len(indices), length of a row]."""
        return self.source.rows(self.order[indices])

    def columns(self, indices: Indices) -> Floats:
        """float32 [rows, len(indices)]."""
        return self.source.columns(indices)[self.order]

    def sampled_columns(self) -> Indices:
        """Columns that are cheap to read of all rows."""
        return self.source.sampled_columns()


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedFileTensor(FileTensor):
    """A tensor in blocks along its last axis. array: uint8 [rows, bytes of a row].

    block: elements and bytes of a block. dequantize: uint8 [n, bytes] -> float32 [n, elements].
    """

    block: tuple[int, int]
    dequantize: Callable[[npt.NDArray[Any]], Floats]

    def rows(self, indices: Indices) -> Floats:
        """float32 [len(indices), last axis]."""
        return self.dequantize(np.ascontiguousarray(self._blocks()[indices]))

    def columns(self, indices: Indices) -> Floats:
        """float32 [rows, len(indices)], of the first block alone.

        Raises: ValueError for others.
        """
        elements, num_bytes = self.block
        if len(indices) and int(indices.max()) >= elements:
            raise ValueError(f"'{self.name}' is read by its first block")
        return self.dequantize(np.ascontiguousarray(self._blocks()[:, :num_bytes]))[:, indices]

    def sampled_columns(self) -> Indices:
        """Columns of the first block: no other has to be read."""
        return np.arange(min(SAMPLED_COLUMNS, self.matrix_shape[1]), dtype=np.int64)

    def _blocks(self) -> npt.NDArray[Any]:
        return self.array().reshape(self.matrix_shape[0], -1)
