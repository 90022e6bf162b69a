"""What an export asks of a calibration: how large the inputs of products are."""

from __future__ import annotations

import dataclasses
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class InputRange:
    """Bounds of the absolute values of a product's input. rest: of most tokens; sinks: of tokens 0 .. S-1, if known."""

    rest: float
    sinks: float | None


class Ranges(Protocol):
    """Of one model."""

    @property
    def sha256(self) -> str:
        """Of the file that they come from (hex)."""

    def input_range(self, module: str, method: str) -> InputRange:
        """Of the input of a module, such as ``model.layers.0.mlp.down_proj``, by a method of `recipe.Calibration`."""
