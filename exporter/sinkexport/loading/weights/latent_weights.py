"""Matrices of latent attention, which a graph holds in two parts, as the one that a file has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sinkexport.families.latent import KEYS, VALUES
from sinkexport.loading.checkpoints.file_tensor import Floats, Indices
from sinkexport.loading.weights.graph_weights import GraphMatrix


def whole_latent_matrices(matrices: Sequence[GraphMatrix]) -> list[GraphMatrix]:
    """The same constants, but for each pair of parts the matrix [H * (N + V), L] that they are of.

    Its rows are for each head those of the key, then those of the value (`sinkexport.families.latent`).
    """
    parts = {part: matrix for matrix in matrices for part in matrix.parts if len(matrix.parts) == 1}
    found, used = [], set[GraphMatrix]()
    for name, keys in parts.items():
        owner, _, kind = name.rpartition(".")
        values = parts.get(f"{owner}.{VALUES}")
        if kind == KEYS and values is not None:
            found.append(_joined(f"{owner}.weight", keys, values))
            used |= {keys, values}
    return [*(matrix for matrix in matrices if matrix not in used), *found]


def _joined(parameter: str, keys: GraphMatrix, values: GraphMatrix) -> GraphMatrix:
    """W_k [H, N, L] and W_v [H, V, L] as one. In INT8 the scales of W_k are by column, as its outputs are."""
    num_heads = int(keys.sources[0].shape.numpy()[0])
    by_row = keys if keys.raw is not None or keys.swapped is None else keys.swapped
    sizes = [matrix.shape[0] // num_heads for matrix in (by_row, values)]
    height, width = sum(sizes), values.shape[1]

    def read(rows: Indices, columns: Indices) -> tuple[Floats, Floats]:
        head, row = rows // height, rows % height
        numbers, steps = (np.zeros((len(rows), len(columns)), np.float32) for _ in range(2))
        for matrix, size, first in ((by_row, sizes[0], 0), (values, sizes[1], sizes[0])):
            chosen = (row >= first) & (row < first + size)
            numbers[chosen], steps[chosen] = matrix.read(head[chosen] * size + row[chosen] - first, columns)
        return numbers, steps

    return GraphMatrix(
        name=f"{keys.name}+{values.name}",
        parts=(parameter,),
        shape=(num_heads * height, width),
        read=read,
        layers=keys.layers,
        sources=(*keys.sources, *values.sources),
    )
