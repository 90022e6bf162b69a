"""Weights that a graph has only in what the model's code computes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sinkexport.loading.checkpoints.file_tensor import FileTensor, Floats
from sinkexport.loading.weights.graph_weights import GraphMatrix, layer_of
from sinkexport.loading.weights.weight_check import WeightCheck
from sinkexport.util.derived_constant import DerivedConstant
from sinkexport.util.traced_names import MODEL


def claim_derived(
    check: WeightCheck,
    left: Sequence[FileTensor],
    tensors: Mapping[str, FileTensor],
    derived: Sequence[DerivedConstant],
    matrices: Sequence[GraphMatrix],
) -> list[FileTensor]:
    """Account for tensors whose numbers went into constants that the graph has, and for those constants.

    A constant counts if each parameter that it was computed of holds the numbers of the file (`tensors`), and the
    graph (`matrices`) has the result, in any layout; a single number may have gone into anything. One that was computed
    of the configuration alone has no parameter, and no tensor of the file.
    Returns: what is left then.
    """
    names = {name: tensor for tensor in tensors.values() for name in check.names_of(tensor.name)}
    accounted: set[str] = set()
    for one in derived:
        parameters = {name.removeprefix(MODEL): values for name, values in one.sources.items()}
        sources = [_sources(check, name, values, names, left) for name, values in parameters.items()]
        if all(sources) and (_claim(check, one.values, matrices) or one.values.size == 1):
            accounted.update(*sources, parameters)
    for name in accounted:
        check.account(name)
    return [tensor for tensor in left if not accounted & set(check.names_of(tensor.name))]


def _sources(
    check: WeightCheck,
    name: str,
    values: Floats,
    names: Mapping[str, FileTensor],
    left: Sequence[FileTensor],
) -> list[str]:
    """Names of the tensors of the file whose numbers a parameter holds; none: it holds others.

    It is the parameter's own one, or those of its layer that transformers joined as it loaded them, one after the
    other. Files of some families have other names for the module.
    """
    values = np.asarray(values, np.float32)
    if name in names:
        return [name] if _is_same(check, names[name], values) else []
    layer, found, start = layer_of(name), [], 0  # files may have another name for the module
    pieces = [tensor for tensor in left if layer_of(tensor.name) == layer and tensor.shape[1:] == values.shape[1:]]
    while start < len(values):
        fits = (t for t in pieces if t.name not in found and _is_same(check, t, values[start : start + t.shape[0]]))
        if (piece := next(fits, None)) is None:
            return []
        found.append(piece.name)
        start += piece.shape[0]
    return found


def _is_same(check: WeightCheck, tensor: FileTensor, values: Floats) -> bool:
    """Whether these are the numbers of a tensor of the file."""
    if tensor.size != values.size:
        return False
    file = np.asarray(tensor.rows(np.arange(tensor.matrix_shape[0])), np.float32).reshape(-1, 1)
    return check.rounding.fits(file, values.reshape(-1, 1), np.zeros_like(file))


def _claim(check: WeightCheck, values: Floats, matrices: Sequence[GraphMatrix]) -> bool:
    """Claim the constants of the graph that hold these numbers: a buffer's own, and nameless ones in any order."""
    wanted, found = values.reshape(-1, 1), False
    in_order = np.sort(wanted, axis=0)
    for matrix in matrices:
        is_weight = any(part in check.parameters for part in matrix.parts)
        if matrix.raw is None or is_weight or matrix.shape[0] * matrix.shape[1] != wanted.size:
            continue
        graph = np.asarray(matrix.raw(), np.float32).reshape(-1, 1)
        pair = (wanted, graph) if matrix.parts else (in_order, np.sort(graph, axis=0))
        if check.rounding.fits(*pair, np.zeros_like(graph)):
            matrix.claimed[:] = found = True
    return found
