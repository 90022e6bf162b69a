"""Places in the constants of a graph where a tensor of a file may lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from sinkexport.loading.checkpoints.file_tensor import FileTensor, Floats, Indices
from sinkexport.loading.weights.graph_weights import GraphMatrix
from sinkexport.loading.weights.weight_rounding import Rounding

MAX_VECTOR = 1 << 17
"""Numbers of a vector that is looked for in pieces."""

MAX_BEGINNINGS = 64
"""Places where a run may begin: the longest run is taken. There are more where many numbers are the same."""

STRIDES = (1, 2)
"""Rows lie one after the other, or every second one: gates between what they multiply."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Rows of a matrix: `count` from `start` on, every `stride`-th. parameter: the model's name for it, if it has one;
    half: of a fused gate and up, 0 or 1. first_row: where the parameter begins, if the place is a piece of it.
    blocks: rows of a block, and rows from one block to the next, where the place is in blocks.
    """

    matrix: GraphMatrix
    start: int
    count: int
    parameter: str = ""
    half: int | None = None
    stride: int = 1
    first_row: int | None = None
    blocks: tuple[int, int] | None = None

    def rows(self, indices: Indices | None = None) -> Indices:
        """Rows of the matrix, of these of the place or of all."""
        if indices is None:
            indices = np.arange(self.count, dtype=np.int64)
        if self.blocks is not None:
            length, distance = self.blocks
            return self.start + indices // length * distance + indices % length
        return self.start + self.stride * indices

    def flattened(self) -> Place | None:
        """All numbers of a matrix one after the other, if the place is all of it and it is small."""
        flat = self.matrix.flat
        if flat is None or self.count != self.matrix.shape[0]:
            return None
        return dataclasses.replace(self, matrix=flat, start=0, count=flat.shape[0])

    def is_whole(self, places: Sequence[Place]) -> bool:
        """Whether it is all of one of these."""
        return any(
            (self.matrix, self.start, self.count, self.stride) == (p.matrix, p.start, p.count, p.stride) for p in places
        )


def is_of_one_expert(tensor: FileTensor) -> bool:
    """Whether a name has two numbers, a layer's and an expert's."""
    return len([part for part in tensor.name.split(".") if part.isdigit()]) > 1


def orientations(place: Place) -> list[Place]:
    """A place, and where it is a pile of matrices the same with each of them transposed."""
    found = [place]
    if place.matrix.swapped is not None and len(place.matrix.parts) == 1:
        found.append(dataclasses.replace(place, matrix=place.matrix.swapped, count=place.matrix.swapped.shape[0]))
    return found


def subplaces(places: Sequence[Place], tensor: FileTensor) -> Iterable[Place]:
    """Places where a tensor may lie: a whole parameter, one expert's matrix, or one half of it."""
    count, width = tensor.matrix_shape
    numbers = [int(part) for part in tensor.name.split(".") if part.isdigit()]
    for place in places:
        for whole in orientations(place):
            if whole.matrix.shape[1] < width:
                continue
            if whole.count == count:
                yield whole
            elif len(tensor.shape) == 3 and whole.count == 2 * count:  # gates of all experts, or what they multiply
                rows = tensor.shape[1]
                for half in (0, 1):
                    yield Place(
                        matrix=whole.matrix,
                        start=whole.start + half * rows,
                        count=count,
                        parameter=whole.parameter,
                        half=half,
                        blocks=(rows, 2 * rows),
                    )
            elif len(numbers) > 1 and whole.count % count == 0:
                expert = numbers[1]
                for share in (1, 2):  # of an expert's rows: all, or gate before up
                    block = count * share
                    if (expert + 1) * block > whole.count or whole.count % block:
                        continue
                    for half in range(share):
                        half_of = half if share == 2 else None
                        start = whole.start + expert * block + half * count
                        yield Place(
                            matrix=whole.matrix, start=start, count=count, parameter=whole.parameter, half=half_of
                        )


def half_of(place: Place, shape: Sequence[int]) -> int | None:
    """Half of a fused parameter in which all rows of a place lie; None: in both.

    shape: of the parameter, [2 N, K], [E, 2 N, K] or [E, K, 2 N]. Places of every second row are of interleaved halves.
    """
    if len(shape) < 2:
        return None
    width = shape[0] if len(shape) == 2 else shape[1] if place.matrix.shape[1] == shape[2] else shape[2]
    rows = place.rows() - (place.first_row if place.first_row is not None else place.start)
    halves = np.unique(rows % 2 if place.stride == 2 else rows % width // max(width // 2, 1))
    return int(halves[0]) if len(halves) == 1 else None


def find_pieces(tensor: FileTensor, places: Sequence[Place], rounding: Rounding) -> list[Place]:
    """A tensor that the model has in several parameters, or whose rows lie between others', as the pieces that follow
    each other in it, by some columns of all rows; none: it is not there as a whole.
    """
    places = [place for place in places if place.matrix.shape[1] == tensor.matrix_shape[1]]
    if not places or (tensor.matrix_shape[1] == 1 and tensor.size > MAX_VECTOR):
        return []
    columns = tensor.sampled_columns()
    wanted = tensor.columns(columns)
    owner = np.repeat(np.arange(len(places)), [place.count for place in places])
    row = np.concatenate([place.rows() for place in places])
    read = [place.matrix.read(place.rows(), columns) for place in places]
    graph, steps = (np.concatenate([pair[i] for pair in read]) for i in (0, 1))
    pieces: list[Place] = []
    start = 0
    while start < len(wanted):
        first, stride, length = _longest_run(wanted[start:], graph, steps, owner, rounding)
        if not length:
            return []
        place = places[owner[first]]
        pieces.append(
            Place(
                matrix=place.matrix,
                start=int(row[first]),
                count=length,
                parameter=place.parameter,
                half=None,
                stride=stride,
                first_row=place.start,
            )
        )
        start += length
    return pieces


def _longest_run(
    wanted: Floats, graph: Floats, steps: Floats, owner: Indices, rounding: Rounding
) -> tuple[int, int, int]:
    """Longest run of the first rows of `wanted` in one place: first row, stride and how many, at least 0."""
    best = (0, 1, 0)
    for begin in np.flatnonzero(rounding.close(wanted[:1], graph, steps).all(axis=1))[:MAX_BEGINNINGS]:
        for stride in STRIDES:
            run = np.arange(begin, len(graph), stride)[: len(wanted)]
            run = run[owner[run] == owner[begin]]
            close = rounding.close(wanted[: len(run)], graph[run], steps[run]).all(axis=1)
            length = len(run) if close.all() else int(close.argmin())
            if length > best[2]:
                best = (int(begin), stride, length)
    return best
