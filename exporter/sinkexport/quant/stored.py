"""A weight matrix as a quantised checkpoint holds it: its integers, scales and zero points, unchanged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

from sinkexport.quant.weight import Rounded

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, eq=False)
class StoredMatrix:
    """A matrix of N outputs by K inputs: w = scale * (integer - zero point).

    name: of its tensor, for errors. shape: [N, K]. bits: of the integers, those of 2 and 3 bits are read as 4.
    block_size: inputs of one output that share a scale; None: all do. symmetric: there are no zero points.
    read: gives rows of it, all if that is None; its columns lie in the order of `order`, which names the input of each
    column; None: as they are. kind: words for reports, such as ``GPTQ 4 bits``.
    """

    name: str
    shape: tuple[int, int]
    bits: Literal[4, 8]
    block_size: int | None
    symmetric: bool
    read: Callable[[Indices | None], Rounded]
    kind: str
    order: Indices | None = None

    def dequantized(self, rows: Indices | None = None) -> Floats:
        """float32 [N, K], or some rows of it; inputs in the model's order. Each is one product, rounded to float32."""
        found = self.read(rows)
        values = np.asarray(found.integers, np.float32)
        block = self.block_size or self.shape[1]
        for group in range(found.scales.shape[1]):
            columns = slice(group * block, (group + 1) * block)
            if found.zero_points is not None:
                values[:, columns] -= found.zero_points[:, group, None].astype(np.float32)
            values[:, columns] *= found.scales[:, group, None]
        if self.order is None:
            return values
        ordered = np.empty_like(values)
        ordered[:, self.order] = values
        return ordered
