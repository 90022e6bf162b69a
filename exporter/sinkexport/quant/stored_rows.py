"""Find where the rows of a model's matrices come from among those of a quantised checkpoint, by their numbers.

No name is read, so whatever a loader did with whole rows is followed: merged and split projections, stacked experts,
heads in another order. Each row that is found is compared bit by bit, so a wrong guess is no possibility.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sinkexport.quant.stored import Indices, StoredMatrix
from sinkexport.quant.weight import Rounded

CHUNK_ELEMENTS = 1 << 22
"""Numbers that are dequantised at a time."""

HALF_OF_BITS = {4: 8, 8: 128}
"""Zero point of integers from 0 that stand for signed ones."""

Hashes = npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True, eq=False)
class StoredRows:
    """Rows of quantised matrices of one form, in any order.

    matrices: those that they are of. number, row: of each row, uint16 and int64 [n], its matrix and its place there.
    """

    matrices: tuple[StoredMatrix, ...]
    number: Indices
    row: Indices

    @property
    def first(self) -> StoredMatrix:
        """One of the matrices: bits, blocks and order are those of all."""
        return self.matrices[0]

    @property
    def symmetric(self) -> bool:
        """Whether no matrix has zero points."""
        return all(matrix.symmetric for matrix in self.matrices)

    @property
    def form(self) -> tuple[object, ...]:
        """What matrices must have in common to be one."""
        order = None if self.first.order is None else self.first.order.tobytes()
        return self.first.bits, self.first.block_size, order

    def read(self) -> Rounded:
        """Integers, scales and zero points as they are stored; of symmetric ones among others, made unsigned."""
        first, count = self.first, len(self.row)
        symmetric, half = self.symmetric, HALF_OF_BITS[self.first.bits]
        groups = 1 if first.block_size is None else -(-first.shape[1] // first.block_size)
        integers = np.empty((count, first.shape[1]), np.int8 if symmetric else np.uint8)
        scales = np.empty((count, groups), np.float32)
        zeros = None if symmetric else np.empty((count, groups), np.uint8)
        for number, matrix in enumerate(self.matrices):
            here = self.number == number
            found = matrix.read(self.row[here])
            scales[here] = found.scales
            if zeros is None or found.zero_points is not None:
                integers[here] = found.integers
            else:
                integers[here] = (found.integers.astype(np.int16) + half).astype(np.uint8)
            if zeros is not None:
                zeros[here] = half if found.zero_points is None else found.zero_points
        return Rounded(integers, scales, zeros)


class RowIndex:
    """The rows of all matrices of a checkpoint by their content. dtype: that the model holds its weights in."""

    def __init__(self, matrices: Sequence[StoredMatrix], dtype: str) -> None:
        self._matrices = tuple(matrices)
        self._dtype = np.dtype(dtype)
        by_depth: dict[int, list[int]] = {}
        for number, matrix in enumerate(self._matrices):
            by_depth.setdefault(matrix.shape[1], []).append(number)
        self._tables = {depth: self._table(numbers) for depth, numbers in by_depth.items()}

    def find(self, rows: npt.NDArray[Any], used: Collection[str] = ()) -> StoredRows | None:
        """Where the rows of a matrix [n, K] come from; None: not all of them from matrices of one form.

        A row that several matrices have, such as one of zeros, is taken from the one that most of the others come from.
        used: names of matrices that were found before, which come after others that have as many.
        """
        table = self._tables.get(rows.shape[-1])
        if table is None or rows.ndim != 2 or not len(rows):
            return None
        hashes, numbers, places = table
        wanted = self._hashes(rows)
        first, end = np.searchsorted(hashes, wanted), np.searchsorted(hashes, wanted, side="right")
        if not (first < end).all():
            return None
        at = self._chosen(numbers, first, end, used)
        used_ones, number = np.unique(numbers[at], return_inverse=True)
        found = StoredRows(tuple(self._matrices[n] for n in used_ones), number, places[at])
        alike = {StoredRows((matrix,), number, places).form for matrix in found.matrices}
        return found if len(alike) == 1 and self._is_equal(found, rows) else None

    def _chosen(self, numbers: Indices, first: Indices, end: Indices, used: Collection[str]) -> Indices:
        """Index into the table [n] of each row, of the candidates from `first` to before `end`."""
        counts = end - first
        votes = np.zeros(len(self._matrices), np.int64)
        voters = counts == 1 if (counts == 1).any() else counts > 0
        for k in range(int(counts[voters].max())):
            here = first[voters & (counts > k)] + k
            votes += np.bincount(numbers[here], minlength=len(votes))
        is_used = np.array([matrix.name in used for matrix in self._matrices])
        rank = np.empty(len(votes), np.int64)
        rank[np.lexsort((np.arange(len(votes)), is_used, -votes))] = np.arange(len(votes))
        at = first.copy()
        shared = np.flatnonzero(counts > 1)
        for k in range(1, int(counts.max())):
            shared = shared[counts[shared] > k]
            other = first[shared] + k
            is_better = rank[numbers[other]] < rank[numbers[at[shared]]]
            at[shared[is_better]] = other[is_better]
        return at

    def _is_equal(self, found: StoredRows, rows: npt.NDArray[Any]) -> bool:
        step = max(1, CHUNK_ELEMENTS // rows.shape[1])
        for number, matrix in enumerate(found.matrices):
            here = np.flatnonzero(found.number == number)
            for start in range(0, len(here), step):
                some = here[start : start + step]
                if not np.array_equal(matrix.dequantized(found.row[some]).astype(self._dtype), rows[some]):
                    return False
        return True

    def _table(self, numbers: Sequence[int]) -> tuple[Hashes, Indices, Indices]:
        """Hashes in order, with the number of the matrix and the row of each; of equal rows of a matrix, the first."""
        parts = []
        for number in numbers:
            matrix = self._matrices[number]
            step = max(1, CHUNK_ELEMENTS // matrix.shape[1])
            for start in range(0, matrix.shape[0], step):
                rows = np.arange(start, min(start + step, matrix.shape[0]))
                hashes = self._hashes(matrix.dequantized(rows).astype(self._dtype))
                parts.append((hashes, np.full(len(rows), number), rows))
        hashes, owners, places = (np.concatenate([part[i] for part in parts]) for i in range(3))
        order = np.lexsort((owners, hashes))
        hashes, owners, places = hashes[order], owners[order], places[order]
        is_first = np.append(True, (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1]))
        return hashes[is_first], owners[is_first], places[is_first]

    def _hashes(self, rows: npt.NDArray[Any]) -> Hashes:
        """uint64 [n]: of the bits of each row, zeros without a sign."""
        unsigned = np.uint32 if self._dtype.itemsize == 4 else np.uint16
        factors = np.random.default_rng(0).integers(1, 2**63, rows.shape[1], np.uint64) | np.uint64(1)
        step = max(1, CHUNK_ELEMENTS // rows.shape[1])
        result = np.empty(len(rows), np.uint64)
        for start in range(0, len(rows), step):
            bits = (np.asarray(rows[start : start + step], self._dtype) + self._dtype.type(0)).view(unsigned)
            result[start : start + step] = (bits * factors).sum(axis=1, dtype=np.uint64)
        return result
