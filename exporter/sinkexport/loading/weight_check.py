"""Compare the weights of a written bundle with the file that the model came from, sharing nothing with its loader.

A few rows of every tensor, and a few columns of all its rows, are read straight from the file and looked for in the
constants of the graphs: where the tensor's own name says, or, if no constant has that name, by their content among
those of the same layer. Each number must be the file's but for the rounding that the constant's type or step allows.
In the end every tensor of the file must have been found, and every parameter and every large constant of the graph
must have come from the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sinkrt.errors import UsageError, problem

from sinkexport.loading.file_tensor import FileTensor, Floats, Indices
from sinkexport.loading.graph_weights import GraphMatrix, layer_of, read_graph
from sinkexport.loading.weight_files import listed
from sinkexport.loading.weight_roles import roles_agree

SAMPLED_ROWS = 8
SMALL = 32
"""Constants of fewer numbers need not be of the file: slopes, indices, scalars."""

EXACT, HALF = 2e-6, 1.5e-3
"""How far a number may be off, relative to itself: float32 that is computed with, float16."""

HALF_STEP = 6e-8
"""Half of float16's least step and a bit."""

MAX_SHARE = 0.6
"""Of a tensor's numbers, in the root mean square, that rounding for its inputs (GPTQ, clipped scales) may change."""

SCALES_ALIKE = 1e-3

Transform = Callable[[Floats], Floats]
TRANSFORMS: Mapping[str, Transform] = {
    "as it is": lambda x: x,
    "x + 1": lambda x: x + 1,  # norms that store scale - 1
    "x - 1": lambda x: x - 1,  # the same, where the file adds 1 and the graph does not
    "-exp x": lambda x: -np.exp(x),  # decay rates
    "log -x": lambda x: np.log(np.where(x < 0, -x, np.nan)),
    "exp x": np.exp,
    "sigmoid x": lambda x: 1 / (1 + np.exp(-x)),
    "tanh x": np.tanh,
}  # fmt: skip
"""What a family's code computes of a vector before anything else, which is folded as the graph is built."""


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How far the numbers of a graph may be from the file's.

    half: they are float16, or computed with float16. nearest: integers are those nearest to the numbers; otherwise
    they were chosen for the inputs, or scales clip. divisors: by module, what its input was divided by and its weights
    multiplied (SmoothQuant); num_kv_heads: to which heads of values those of an attention's output belong.
    """

    half: bool = False
    nearest: bool = True
    divisors: Mapping[str, Floats] = dataclasses.field(default_factory=dict)
    num_kv_heads: int = 1

    def fits(self, file: Floats, graph: Floats, steps: Floats) -> bool:
        """Whether numbers of the graph, [n, m] with their steps, are those of the file."""
        if graph.shape != file.shape or not np.isfinite(graph).all():
            return False
        relative, least = (HALF, HALF_STEP) if self.half else (EXACT, 1e-30)
        gap = np.abs(graph - file)
        allowed = relative * np.maximum(np.abs(file), np.abs(graph)) + least
        if not steps.any():
            return bool((gap <= allowed).all())
        if self.nearest:
            return bool((gap <= allowed + 1.01 * steps).all())
        power = float(np.square(file, dtype=np.float64).sum())
        close = float(np.square(gap, dtype=np.float64).sum()) <= MAX_SHARE**2 * power
        return close or bool((gap <= allowed + 1.01 * steps).all())


@dataclasses.dataclass(frozen=True)
class Place:
    """Rows of a matrix: `count` from `start` on, every `stride`-th. parameter: the model's name for it, if it has one;
    half: of a fused gate and up, 0 or 1."""

    matrix: GraphMatrix
    start: int
    count: int
    parameter: str = ""
    half: int | None = None
    stride: int = 1

    def rows(self, indices: Indices | None = None) -> Indices:
        """Rows of the matrix, of these of the place or of all."""
        return self.start + self.stride * (np.arange(self.count, dtype=np.int64) if indices is None else indices)


class WeightCheck:
    """One comparison. tensors: of the file. parameters: shape of each of the model's parameters, by all its names;
    tied: the names of each parameter, those that share it together."""

    def __init__(
        self, tensors: Mapping[str, FileTensor], parameters: Mapping[str, tuple[int, ...]],
        tied: Sequence[frozenset[str]], rounding: Rounding, prefix: str,
    ) -> None:  # fmt: skip
        self._tensors = tensors
        self.parameters = parameters
        self._tied = {name: names for names in tied for name in names}
        self._rounding = rounding
        self._prefix = prefix
        self.accounted: set[str] = set()
        """Names of parameters that came from the file."""
        self.folded: set[str] = set()
        """Tensors that were found in constants without a parameter's name."""

    def compare(self, matrices: Sequence[GraphMatrix]) -> list[FileTensor]:
        """Find every tensor in the constants of a graph. Returns: those that are not there.

        Raises: UsageError naming a tensor whose own constant holds other numbers.
        """
        named, by_layer = self._places(matrices)
        anonymous = [matrix for matrix in matrices if not matrix.parts]
        left = []
        for tensor in self._tensors.values():
            place = next((named[name] for name in self._names(tensor.name) if name in named), None)
            if place is not None:
                if not self._claim_named(tensor, place):
                    raise differs(tensor, f"'{place.parameter}' in the graph holds other numbers")
            elif not self._claim_folded(tensor, anonymous) and not self._claim_found(tensor, by_layer):
                left.append(tensor)
        return left

    def _names(self, name: str) -> list[str]:
        """What the model may call a tensor of this name: itself, with or without the base model's prefix, or a
        parameter that shares it."""
        spelled = [name, f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")]
        return [*spelled, *(other for one in spelled for other in self._tied.get(one, ()))]

    def _places(
        self, matrices: Sequence[GraphMatrix]
    ) -> tuple[dict[str, Place], dict[int | None, list[Place]]]:
        """Every parameter that the graph has under its own name, and the same by layer."""
        named: dict[str, Place] = {}
        by_layer: dict[int | None, list[Place]] = {}
        for matrix in matrices:
            start = 0
            for part in matrix.parts:
                shape = self.parameters.get(part)
                count = matrix.shape[0] if len(matrix.parts) == 1 or shape is None else shape[0]
                named[part] = Place(matrix, start, count, part)
                by_layer.setdefault(layer_of(part), []).append(named[part])
                start += count
        return named, by_layer

    # --- by name ---

    def _claim_named(self, tensor: FileTensor, place: Place) -> bool:
        for candidate in _orientations(place, tensor):
            for columns, rows in self._factors(candidate.parameter, candidate.count, tensor):
                if self._fits(tensor, candidate, columns, rows):
                    self._claim(candidate)
                    return True
            if tensor.matrix_shape[1] == 1 and self._fits_folded(tensor, candidate):
                self._claim(candidate)
                return True
        return False

    def _fits(
        self, tensor: FileTensor, place: Place, by_column: Floats | None = None, by_row: Floats | None = None,
        order: Indices | None = None,
    ) -> bool:  # fmt: skip
        """A few whole rows, and a few columns of all rows. order: rows of the tensor that stand in the place."""
        count, width = place.count, tensor.matrix_shape[1]
        if order is None:
            order = np.arange(count, dtype=np.int64)
        if len(order) != count or not width <= place.matrix.shape[1] < width + place.matrix.slack + 1:
            return False
        some = np.unique(np.linspace(0, count - 1, SAMPLED_ROWS).astype(np.int64))
        every = np.arange(width, dtype=np.int64)
        few = tensor.sampled_columns()
        for rows, columns, file in ((some, every, lambda: tensor.rows(order[some])),
                                    (np.arange(count), few, lambda: tensor.columns(few)[order])):  # fmt: skip
            graph, steps = place.matrix.read(place.rows(rows), columns)
            wanted = file()
            if by_column is not None:
                wanted = wanted * by_column[columns]
            if by_row is not None:
                wanted = wanted * by_row[rows][:, None]
            if not self._rounding.fits(wanted, graph, steps):
                return False
        return True

    def _factors(
        self, parameter: str, count: int, tensor: FileTensor
    ) -> Iterable[tuple[Floats | None, Floats | None]]:
        """By what smoothing may have multiplied the columns and the rows of a parameter."""
        divisors, layer = self._rounding.divisors, layer_of(parameter)
        yield None, None
        if not divisors:
            return
        module, width = parameter.removesuffix(".weight"), tensor.matrix_shape[1]
        own = divisors.get(module)
        columns = [None] if own is None or width == 1 else [own]
        rows: list[Floats | None] = [None]
        for name, found in divisors.items():
            if layer is not None and layer_of(name) != layer:
                continue
            if len(found) == count:
                rows.append(1.0 / found)
            per_head = found.reshape(self._rounding.num_kv_heads, -1) if len(found) % self._rounding.num_kv_heads == 0 \
                else found[None]  # fmt: skip
            head_dim = count // len(per_head)
            if len(found) > count and head_dim and count % len(per_head) == 0:  # of grouped values
                rows.append((1.0 / per_head[:, :head_dim]).reshape(-1))
        yield from ((c, r) for c in columns for r in rows)

    # --- by content ---

    def _fits_folded(self, tensor: FileTensor, place: Place) -> bool:
        return any(self._fits_transformed(tensor, place, transform) for transform in TRANSFORMS.values())

    def _fits_transformed(self, tensor: FileTensor, place: Place, transform: Transform) -> bool:
        graph, steps = place.matrix.read(place.rows(), np.zeros(1, np.int64))
        with np.errstate(all="ignore"):
            wanted = np.asarray(transform(tensor.columns(np.zeros(1, np.int64))), np.float32)
        return self._rounding.fits(wanted, graph, steps)

    def _claim_folded(self, tensor: FileTensor, anonymous: Sequence[GraphMatrix]) -> bool:
        """Look in constants that were computed of weights, and have no names."""
        layer = layer_of(tensor.name)
        for free in (True, False):  # two tensors may hold the same numbers
            for matrix in anonymous:
                if matrix.claimed.all() == free or (layer is not None and not matrix.layers[0] <= layer <= matrix.layers[1]):
                    continue
                if matrix.raw is None or matrix.raw().size != tensor.size:
                    continue
                values = np.asarray(matrix.raw(), np.float32).reshape(-1, 1)
                own = np.asarray(tensor.array(), np.float32).reshape(-1, 1) if tensor.size <= 1 << 20 else None
                if own is None:
                    continue
                with np.errstate(all="ignore"):
                    fits = any(self._rounding.fits(np.asarray(transform(own), np.float32), values, np.zeros_like(values))
                               for transform in TRANSFORMS.values())  # fmt: skip
                if fits:
                    matrix.claimed[:] = True
                    self.folded.add(tensor.name)
                    self._note(tensor.name)
                    return True
        return False

    def _claim_found(self, tensor: FileTensor, by_layer: Mapping[int | None, list[Place]]) -> bool:
        """Look in all constants of the tensor's layer, whatever their names: whole, then in pieces."""
        places = [place for place in by_layer.get(layer_of(tensor.name), []) if tensor.size]
        for place in _subplaces(places, tensor):
            if not roles_agree(tensor.name, place.parameter, place.half):
                continue
            if self._fits(tensor, place) or (tensor.matrix_shape[1] == 1 and self._fits_folded(tensor, place)):
                self._claim(place)
                return True
        return self._claim_pieces(tensor, places)

    def _claim_pieces(self, tensor: FileTensor, places: Sequence[Place]) -> bool:
        """A tensor that the model has in several parameters, or whose rows lie between others'."""
        if len(tensor.shape) < 2:
            return False
        columns = tensor.sampled_columns()
        wanted = tensor.columns(columns)
        candidates = [p for place in places for p in _orientations(place, tensor) if p.matrix.shape[1] == tensor.shape[-1]]
        if not candidates:
            return False
        owner = np.repeat(np.arange(len(candidates)), [place.count for place in candidates])
        row = np.concatenate([place.rows() for place in candidates])
        read = [place.matrix.read(place.rows(), columns) for place in candidates]
        graph, steps = (np.concatenate([pair[i] for pair in read]) for i in (0, 1))
        pieces: list[Place] = []
        start = 0
        while start < len(wanted):
            found = self._longest_run(wanted[start:], graph, steps, owner)
            if found is None:
                return False
            first, stride, length = found
            place = candidates[owner[first]]
            piece = Place(place.matrix, int(row[first]), length, place.parameter, None, stride)
            order = np.arange(start, start + length, dtype=np.int64)
            if not roles_agree(tensor.name, place.parameter, None) or not self._fits(tensor, piece, order=order):
                return False
            pieces.append(piece)
            start += length
        for piece in pieces:
            self._claim(piece)
        return True

    def _longest_run(
        self, wanted: Floats, graph: Floats, steps: Floats, owner: Indices
    ) -> tuple[int, int, int] | None:
        """Where the first rows of `wanted` lie one after the other, or every second: first row, stride and how many."""
        first = [i for i in range(len(graph)) if self._rounding.fits(wanted[:1], graph[i : i + 1], steps[i : i + 1])] \
            if len(graph) < 1 << 12 else self._rows_like(wanted[0], graph, steps)  # fmt: skip
        best: tuple[int, int, int] | None = None
        for begin in first:
            for stride in (1, 2):
                run = np.arange(begin, len(graph), stride)[: len(wanted)]
                run = run[owner[run] == owner[begin]]
                gap = np.abs(graph[run] - wanted[: len(run)])
                relative = HALF if self._rounding.half else EXACT
                close = (gap <= relative * np.abs(wanted[: len(run)]) + HALF_STEP + 1.01 * steps[run]).all(axis=1)
                length = len(run) if close.all() else int(close.argmin())
                if length and (best is None or length > best[2]):
                    best = (int(begin), stride, length)
        return best

    def _rows_like(self, wanted: Floats, graph: Floats, steps: Floats) -> list[int]:
        relative = HALF if self._rounding.half else EXACT
        close = np.abs(graph - wanted) <= relative * np.abs(wanted) + HALF_STEP + 1.01 * steps
        return [int(i) for i in np.flatnonzero(close.all(axis=1))]

    # --- accounts ---

    def _claim(self, place: Place) -> None:
        place.matrix.claimed[place.rows()] = True
        if place.parameter:
            self._note(place.parameter)

    def _note(self, name: str) -> None:
        self.accounted.update(self._names(name))


def _orientations(place: Place, tensor: FileTensor) -> list[Place]:
    """A place, and where it is a pile of matrices the same with each of them transposed."""
    found = [place]
    if place.matrix.swapped is not None and len(place.matrix.parts) == 1:
        found.append(dataclasses.replace(place, matrix=place.matrix.swapped, count=place.matrix.swapped.shape[0]))
    return found


def _subplaces(places: Sequence[Place], tensor: FileTensor) -> Iterable[Place]:
    """Where a tensor may lie: a whole parameter, one expert's matrix, or one half of it."""
    count, width = tensor.matrix_shape
    numbers = [int(part) for part in tensor.name.split(".") if part.isdigit()]
    for place in places:
        for whole in _orientations(place, tensor):
            if whole.matrix.shape[1] < width:
                continue
            if whole.count == count:
                yield whole
            elif len(numbers) > 1 and whole.count % count == 0:
                expert = numbers[1]
                for share in (1, 2):  # of an expert's rows: all, or gate before up
                    block = count * share
                    if (expert + 1) * block > whole.count or whole.count % block:
                        continue
                    for half in range(share):
                        half_of = half if share == 2 else None
                        start = whole.start + expert * block + half * count
                        yield Place(whole.matrix, start, count, whole.parameter, half_of)


def differs(tensor: FileTensor, why: str) -> UsageError:
    """What the export made is not what the file holds."""
    return UsageError(problem(f"weights '{tensor.name}' of {tensor.file}", received=why,
                              expected="the numbers of the file", fix="this model cannot be exported exactly; "
                              "please report it"))  # fmt: skip


def unclaimed(matrices: Iterable[GraphMatrix]) -> list[str]:
    """Constants that hold more than a few numbers which are not of the file, nor of a plain computation."""
    return [matrix.name for matrix in matrices
            if not matrix.claimed.all() and not (matrix.swapped is not None and matrix.swapped.claimed.all())
            and not _is_computed(matrix)]  # fmt: skip


OWN = ("frequency_", "alibi_slopes", "sink_scale_", "calibrated_", "affine.")
"""Constants that the traced step has beside the model: from the probe, or from files of their own."""


def _is_computed(matrix: GraphMatrix) -> bool:
    """Masks, fills and the step's own constants; a parameter of the model is never one."""
    if matrix.parts:
        return False
    if matrix.name.startswith(OWN) or matrix.raw is None:
        return matrix.name.startswith(OWN)
    values = np.asarray(matrix.raw())
    return values.size <= SMALL or len(np.unique(values[np.isfinite(values)])) <= 2
