"""Compare the weights of a written bundle with the file that the model came from, sharing nothing with its loader.

A few rows of every tensor, and a few columns of all its rows, are read straight from the file and looked for in the
constants of the graphs: where the tensor's own name says, or, if no constant has that name, by their content among
those of the same layer. Each number must be the file's but for the rounding that the constant's type or step allows.
In the end every tensor of the file must have been found, and every parameter and every large constant of the graph
must have come from the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sinkexport.loading.checkpoints.file_tensor import FileTensor, Floats, Indices
from sinkexport.loading.weights.graph_weights import GraphMatrix, layer_of
from sinkexport.loading.weights.weight_places import (
    Place,
    find_pieces,
    half_of,
    is_of_one_expert,
    orientations,
    subplaces,
)
from sinkexport.loading.weights.weight_refusals import differs
from sinkexport.loading.weights.weight_roles import roles_agree
from sinkexport.loading.weights.weight_rounding import (
    AS_IT_IS,
    FOLDED_BY_CODE,
    UNDONE_FOR_CODE,
    Rounding,
    Transform,
)
from sinkexport.util.process_memory import release_pages

SAMPLED_ROWS = 8
FOLDED = 1 << 20
"""Numbers of a tensor that may have been computed with as the graph was built."""

MAX_HEADS = 512
"""Numbers that a tensor with one for each head may have."""


class WeightCheck:
    """One comparison. tensors: of the file. parameters: shape of each of the model's parameters, by all its names;
    tied: the names of each parameter, those that share it together."""

    def __init__(
        self,
        tensors: Mapping[str, FileTensor],
        parameters: Mapping[str, tuple[int, ...]],
        tied: Sequence[frozenset[str]],
        rounding: Rounding,
        prefix: str,
        *,
        is_gguf: bool = False,
    ) -> None:
        self._tensors = tensors
        self.parameters = parameters
        self._tied = {name: names for names in tied for name in names}
        self.rounding = rounding
        self._prefix = prefix
        self._is_gguf = is_gguf
        self._of_folded = AS_IT_IS if is_gguf else FOLDED_BY_CODE
        self._of_named = UNDONE_FOR_CODE if is_gguf else AS_IT_IS
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
        left, before = [], None
        for tensor in self._tensors.values():
            if before is not None and layer_of(tensor.name) != layer_of(before.name):
                _release(by_layer.get(layer_of(before.name), ()), before)
            before = tensor
            places = next((named[name] for name in self.names_of(tensor.name) if name in named), ())
            for place in places:  # several if one of them is smoothed
                if not self._claim_named(tensor, place):
                    raise differs(tensor, f"'{place.parameter}' in the graph holds other numbers")
            if places:
                continue
            if not (
                self._claim_folded(tensor, anonymous)
                or self._claim_found(tensor, by_layer, anonymous)
                or self._claim_rows(tensor, named)
                or self._claim_by_head(tensor, anonymous)
            ):
                left.append(tensor)
        if self._is_gguf:
            self._claim_zeros(named)
        _release((place for one in by_layer.values() for place in one), before)
        return left

    def names_of(self, name: str) -> list[str]:
        """Names that the model may have for a tensor of this name.

        They are the name itself with or without the base model's prefix, and those of parameters that share it.
        """
        spelled = [name, f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")]
        return [*spelled, *(other for one in spelled for other in self._tied.get(one, ()))]

    def _places(self, matrices: Sequence[GraphMatrix]) -> tuple[dict[str, list[Place]], dict[int | None, list[Place]]]:
        """Every parameter that the graph has under its own name, and the same by layer."""
        named: dict[str, list[Place]] = {}
        by_layer: dict[int | None, list[Place]] = {}
        for matrix in matrices:
            start = 0
            for part in matrix.parts:
                shape = self.parameters.get(part)
                count = matrix.shape[0] if len(matrix.parts) == 1 or shape is None else shape[0]
                place = Place(matrix=matrix, start=start, count=count, parameter=part)
                named.setdefault(part, []).append(place)
                by_layer.setdefault(layer_of(part), []).append(place)
                start += count
        return named, by_layer

    # --- by name ---

    def _claim_named(self, tensor: FileTensor, place: Place) -> bool:
        for candidate in orientations(place):
            for columns, rows in self._factors(candidate, tensor):
                if self._fits(tensor, candidate, columns, rows):
                    self._claim(tensor, candidate)
                    return True
        return False

    def _fits(
        self,
        tensor: FileTensor,
        place: Place,
        by_column: Floats | None = None,
        by_row: Floats | None = None,
        order: Indices | None = None,
    ) -> bool:
        """A few whole rows, and a few columns of all rows. order: rows of the tensor that stand in the place."""
        count, width = place.count, tensor.matrix_shape[1]
        if order is None:
            order = np.arange(count, dtype=np.int64)
        if len(order) != count or not width <= place.matrix.shape[1] < width + place.matrix.slack + 1:
            return False
        some = np.unique(np.linspace(0, count - 1, SAMPLED_ROWS).astype(np.int64))
        every = np.arange(width, dtype=np.int64)
        few = tensor.sampled_columns()
        for rows, columns, file in (
            (some, every, lambda: tensor.rows(order[some])),
            (np.arange(count), few, lambda: tensor.columns(few)[order]),
        ):
            graph, steps = place.matrix.read(place.rows(rows), columns)
            wanted = file()
            if by_column is not None:
                wanted = wanted * by_column[columns]
            if by_row is not None:
                wanted = wanted * by_row[rows][:, None]
            if not self.rounding.fits(wanted, graph, steps):
                return False
        return True

    def _factors(self, place: Place, tensor: FileTensor) -> Iterable[tuple[Floats | None, Floats | None]]:
        """Factors that smoothing may have put on the columns and the rows of a parameter."""
        own = self.rounding.divisors.get(place.parameter.removesuffix(".weight"))
        columns = [None] if own is None or tensor.matrix_shape[1] == 1 else [None, own]
        yield from (
            (column, row) for row in self._factors_of_rows(layer_of(place.parameter), place.count) for column in columns
        )

    def _factors_of_rows(self, layer: int | None, count: int) -> Iterable[Floats | None]:
        """Factors that smoothing may have put on the results of a norm or of a matmul, None for none."""
        yield None
        for name, found in self.rounding.divisors.items():
            if layer is not None and layer_of(name) != layer:
                continue
            if len(found) == count:
                yield np.asarray(1.0 / found, np.float32)
            groups, odd = divmod(len(found), count)
            if groups > 1 and not odd and not len(found) % self.rounding.num_kv_heads:
                # Values whose heads are shared by groups of queries.
                heads = found.reshape(self.rounding.num_kv_heads, groups, -1)
                yield np.asarray(1.0 / heads[:, 0], np.float32).reshape(-1)

    # --- by content ---

    def _fits_vector(self, tensor: FileTensor, place: Place) -> bool:
        """Whether a parameter holds what the family's code makes the tensor's numbers of."""
        if tensor.matrix_shape[1] != 1 or place.matrix.shape[1] != 1:
            return False
        graph, _steps = place.matrix.read(place.rows(), np.zeros(1, np.int64))
        return self._fits_transformed(tensor, graph, self._of_named)

    def _fits_transformed(self, tensor: FileTensor, graph: Floats, transforms: Sequence[Transform]) -> bool:
        """Whether numbers [n, 1] of the graph are something that a family's code computes of the tensor."""
        file = np.asarray(tensor.rows(np.arange(tensor.matrix_shape[0])), np.float32).reshape(-1, 1)
        none = np.zeros_like(graph)
        with np.errstate(all="ignore"):
            made = [np.asarray(transform(file), np.float32) for transform in transforms]
        return any(
            self.rounding.fits(one if row is None else one * row[:, None], graph, none)
            for row in self._factors_of_rows(layer_of(tensor.name), len(file))
            for one in made
        )

    def _claim_folded(self, tensor: FileTensor, anonymous: Sequence[GraphMatrix]) -> bool:
        """Look in constants that were computed of weights, and have no names."""
        layer = layer_of(tensor.name)
        for free in (True, False):  # two tensors may hold the same numbers
            for matrix in anonymous:
                if matrix.claimed.all() == free or not matrix.may_be_of(layer) or matrix.raw is None:
                    continue
                values = np.asarray(matrix.raw(), np.float32).reshape(-1, 1)
                if values.size == tensor.size <= FOLDED and self._fits_transformed(tensor, values, self._of_folded):
                    matrix.claimed[:] = True
                    self.folded.add(tensor.name)
                    self.account(tensor.name)
                    return True
        return False

    def _claim_found(
        self, tensor: FileTensor, by_layer: Mapping[int | None, list[Place]], anonymous: Sequence[GraphMatrix]
    ) -> bool:
        """Look in all constants of the tensor's layer, whatever their names: whole, then in pieces."""
        places = [place for place in by_layer.get(layer_of(tensor.name), []) if tensor.size]
        if len(tensor.shape) == 1:
            places += [one for place in places if (one := place.flattened()) is not None]
        for place in subplaces(places, tensor):
            if not self._may_be(tensor, place):
                continue
            if self._fits(tensor, place) or self._fits_vector(tensor, place):
                self._claim(tensor, place)
                return True
        if tensor.name.endswith("bias") and len(tensor.shape) == 2:  # of experts: a part of each row of another
            layer = layer_of(tensor.name)
            places += [Place(matrix=m, start=0, count=m.shape[0]) for m in anonymous if m.may_be_of(layer)]
            flat = [one for place in places if (one := place.flattened()) is not None]
            return self._claim_pieces(tensor.flattened(), flat)
        return self._claim_pieces(tensor, [p for place in places for p in orientations(place)])

    def _claim_rows(self, tensor: FileTensor, named: Mapping[str, list[Place]]) -> bool:
        """A small matrix whose rows the model has as vectors of their own, numbered: a norm for each head."""
        count = tensor.matrix_shape[0]
        if len(tensor.shape) != 2 or count > MAX_HEADS:
            return False
        for first in [name for name in named if ".0." in name and layer_of(name) == layer_of(tensor.name)]:
            before, _, after = first.rpartition(".0.")
            names = [f"{before}.{i}.{after}" for i in range(count)]
            if f"{before}.{count}.{after}" in named or any(name not in named for name in names):
                continue
            places = [(i, place) for i, name in enumerate(names) for place in named[name]]
            if all(self._is_row(tensor, i, place) for i, place in places):
                for _, place in places:
                    self._claim(tensor, place)
                return True
        return False

    def _is_row(self, tensor: FileTensor, row: int, place: Place) -> bool:
        """Whether a vector of the graph is a row of the tensor."""
        if place.matrix.shape[1] != 1 or place.count != tensor.matrix_shape[1] or not self._may_be(tensor, place):
            return False
        graph, steps = place.matrix.read(place.rows(), np.zeros(1, np.int64))
        return self.rounding.fits(tensor.rows(np.array([row])).reshape(-1, 1), graph, steps)

    def _claim_zeros(self, named: Mapping[str, list[Place]]) -> None:
        """Biases of nothing but zeros that the family's code wants and a GGUF file may lack: it has none then."""
        for name, places in named.items():
            for place in places if name.endswith(".bias") and name not in self.accounted else ():
                graph, _steps = place.matrix.read(place.rows(), np.arange(place.matrix.shape[1]))
                if not graph.any():
                    place.matrix.claimed[place.rows()] = True
                    self.account(name)

    def _claim_by_head(self, tensor: FileTensor, anonymous: Sequence[GraphMatrix]) -> bool:
        """A number for each head, where heads have windows of their own: the graph has those of each window apart."""
        if len(tensor.shape) != 1 or tensor.size > MAX_HEADS:
            return False
        file = tensor.rows(np.arange(tensor.size)).reshape(-1)
        seen = np.zeros(tensor.size, bool)
        taken = []
        for matrix in anonymous:
            if matrix.raw is None or not matrix.may_be_of(layer_of(tensor.name)) or matrix.shape[0] >= tensor.size:
                continue
            values = np.asarray(matrix.raw(), np.float32).reshape(-1, 1)  # [n, 1]
            same = self.rounding.close(file[None], values, np.zeros_like(values))  # [n, heads]
            if same.any(axis=1).all():
                seen |= same.any(axis=0)
                taken.append(matrix)
        if not seen.all():
            return False
        for matrix in taken:
            matrix.claimed[:] = True
        self.folded.add(tensor.name)
        self.account(tensor.name)
        return True

    def _claim_pieces(self, tensor: FileTensor, candidates: Sequence[Place]) -> bool:
        """Look for a tensor in pieces: whole parameters one after the other, or a part of one.

        No other order of rows counts as its own, but that of fused queries, keys and values in GGUF files.
        """
        if is_of_one_expert(tensor):
            return False
        pieces = find_pieces(tensor, candidates, self.rounding)
        is_free = self._is_gguf and "qkv" in tensor.name
        if len(pieces) > 1 and not is_free and not all(piece.is_whole(candidates) for piece in pieces):
            return False
        start = 0
        for piece in pieces:
            order = np.arange(start, start + piece.count, dtype=np.int64)
            if not self._may_be(tensor, piece) or not self._fits(tensor, piece, order=order):
                return False
            start += piece.count
        for piece in pieces:
            self._claim(tensor, piece)
        return bool(pieces)

    def _may_be(self, tensor: FileTensor, place: Place) -> bool:
        """Whether the names agree: the tensor's and any that the parameter has."""
        names = self._tied.get(place.parameter, (place.parameter,))
        half = place.half if place.half is not None else half_of(place, self.parameters.get(place.parameter, ()))
        return any(roles_agree(tensor.name, name, half) for name in names)

    # --- accounts ---

    def _claim(self, tensor: FileTensor, place: Place) -> None:
        place.matrix.claimed[place.rows()] = True
        if place.parameter:
            self.account(place.parameter)
        else:
            self.folded.add(tensor.name)

    def account(self, name: str) -> None:
        """Note that a parameter came from the file."""
        self.accounted.update(self.names_of(name))


def _release(places: Iterable[Place], tensor: FileTensor | None) -> None:
    """Let go of pages that were read: those of constants, and those of the file that a tensor is in."""
    for place in places:
        place.matrix.release()
    if tensor is not None:
        release_pages(tensor.array())
