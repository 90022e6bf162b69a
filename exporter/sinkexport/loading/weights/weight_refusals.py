"""Refusals of a comparison of weights: tensors that the graph lacks, and constants that are not of the file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
from sinkrt.errors import UsageError, problem

from sinkexport.loading.checkpoints.file_tensor import FileTensor
from sinkexport.loading.checkpoints.weight_files import listed
from sinkexport.loading.weights.graph_weights import GraphMatrix

SMALL = 32
"""Constants of fewer numbers need not be of the file: slopes, indices, scalars."""


def differs(tensor: FileTensor, why: str) -> UsageError:
    """Refusal of an export whose numbers are not the file's."""
    return UsageError(
        problem(
            f"weights '{tensor.name}' of {tensor.file}",
            received=why,
            expected="the numbers of the file",
            fix="this model cannot be exported exactly; please report it",
        )
    )


def refuse_strangers(names: Sequence[str], what: str) -> None:
    """Refuse what the bundle has and the file has not. what: these names are of.

    Raises: UsageError if there are any names.
    """
    if names:
        raise UsageError(
            problem(
                "weights",
                received=f"{len(names)} {what} that are not of the file: {listed(names)}",
                expected="the numbers of the file",
                fix="this model cannot be exported exactly; please report it",
            )
        )


def unclaimed(matrices: Iterable[GraphMatrix], parameters: Collection[str], num_heads: int) -> list[str]:
    """Constants that hold more than a few numbers which are not of the file, nor of a plain computation.

    parameters: of the model. num_heads: of queries; each may have a number: a slope, a factor of tuned attention.
    """
    return [
        matrix.name
        for matrix in matrices
        if not matrix.is_claimed
        and (any(part in parameters for part in matrix.parts) or not _is_computed(matrix, max(SMALL, num_heads)))
    ]


OWN = ("frequency_", "alibi_slopes", "sink_scale_", "calibrated_", "affine.")
"""Constants that the traced step has beside the model: from the probe, or from files of their own."""


def _is_computed(matrix: GraphMatrix, small: int) -> bool:
    """Masks, fills and the step's own constants."""
    if matrix.name.startswith(OWN) or matrix.raw is None:
        return matrix.name.startswith(OWN)
    values = np.asarray(matrix.raw())
    return values.size <= small or len(np.unique(values[np.isfinite(values)])) <= 2
