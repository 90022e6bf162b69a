"""Distance that the numbers of a graph may have from those of the file that they came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sinkexport.loading.checkpoints.file_tensor import Floats

EXACT, HALF = 2e-6, 1.5e-3
"""Relative error of a number: float32 that is computed with, float16."""

HALF_STEP = 6e-8
"""Half of float16's least step and a bit."""

MAX_SHARE = 0.6
"""Share of a tensor's root mean square that rounding for its inputs (GPTQ, clipped scales) may change."""

LOOSE_STEPS = 8
"""Steps by which rounding for inputs may move a number, where one row is looked for among others."""

Transform = Callable[[Floats], npt.NDArray[Any]]
AS_IT_IS: tuple[Transform, ...] = (lambda x: x,)
FOLDED_BY_CODE: tuple[Transform, ...] = (
    lambda x: x,
    lambda x: x + 1,  # norms that store scale - 1
    lambda x: -np.exp(x),  # decay rates that store their logarithm
    lambda x: np.exp(x),
    lambda x: np.tanh(x),
    lambda x: 1 / (1 + np.exp(-x)),
)
"""Functions of a parameter that a family's code may compute first, which are folded as the graph is built."""

UNDONE_FOR_CODE: tuple[Transform, ...] = (
    lambda x: x,
    lambda x: x - 1,
    lambda x: np.log(np.where(x < 0, -x, np.nan)),
)
"""Functions from a GGUF tensor, which has the scale or the decay rate itself, to the parameter."""


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Distance that the numbers of a graph may have from the file's.

    half: they are float16, or computed with float16. nearest: integers are those nearest to the numbers; otherwise
    they were chosen for the inputs, or scales clip. exact: integers stand for the numbers, and no step is allowed.
    divisors: by module, what its input was divided by and its weights
    multiplied (SmoothQuant); num_kv_heads: to which heads of values those of an attention's output belong.
    """

    half: bool = False
    nearest: bool = True
    exact: bool = False
    divisors: Mapping[str, Floats] = dataclasses.field(default_factory=dict)
    num_kv_heads: int = 1

    def fits(self, file: Floats, graph: Floats, steps: Floats) -> bool:
        """Whether numbers of the graph, [n, m] with their steps, are those of the file."""
        if graph.shape != file.shape or not np.isfinite(graph).all():
            return False
        gap = np.abs(graph - file)
        if bool((gap <= self._allowed(file, graph) + (0.0 if self.exact else 1.01) * steps).all()):
            return True
        if self.nearest or self.exact or not steps.any():
            return False
        power = float(np.square(file, dtype=np.float64).sum())
        return float(np.square(gap, dtype=np.float64).sum()) <= MAX_SHARE**2 * power

    def close(self, file: Floats, graph: Floats, steps: Floats) -> npt.NDArray[np.bool_]:
        """Whether each number of the graph may be the file's: [n, m]. One of the two may have one row."""
        steps = steps * (0.0 if self.exact else 1.01 if self.nearest else LOOSE_STEPS)
        near: npt.NDArray[np.bool_] = np.abs(graph - file) <= self._allowed(file, graph) + steps
        return near

    def _allowed(self, file: Floats, graph: Floats) -> Floats:
        relative, least = (HALF, HALF_STEP) if self.half else (EXACT, 1e-30)
        return np.asarray(relative * np.maximum(np.abs(file), np.abs(graph)) + least, np.float32)
