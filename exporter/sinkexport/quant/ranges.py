"""What an export asks of a calibration: how large inputs are, how to smooth them, how weights were rounded for them."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sinkexport.quant.recipe import Recipe
from sinkexport.quant.weight import Rounded, WeightScheme


@dataclasses.dataclass(frozen=True)
class InputRange:
    """Bounds of the absolute values of a matmul's input.

    rest: of most tokens; sinks: of the first tokens of a stream, if known; all: of all tokens, found as `rest` is.
    """

    rest: float
    sinks: float | None
    all: float


class Ranges(Protocol):
    """Ranges of one model, by module, such as ``model.layers.0.mlp.down_proj``; after smoothing, where that is done."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the file that they come from (hex)."""

    @property
    def num_sink_tokens(self) -> int:
        """Tokens 0 .. n-1 of a stream are those of `InputRange.sinks`."""

    def input_range(self, module: str) -> InputRange:
        """Range of the module's input. Raises: UsageError if there is none."""

    def divisors(self, module: str) -> npt.NDArray[np.float64] | None:
        """[K], what the channels of the module's input are divided by (arXiv:2211.10438); None: not smoothed."""

    def rounded(self, module: str, scheme: WeightScheme, num_inputs: int) -> Rounded:
        """The module's weights [N, num_inputs] as GPTQ rounded them under `scheme`. Raises: UsageError if not."""

    def readers(self, module: str) -> tuple[str, ...]:
        """All modules that read the same input as this one, itself included."""

    def check_recipe(self, recipe: Recipe) -> None:
        """Raises: UsageError if they were found for another recipe."""

    def check_model(self, model: Any) -> None:
        """Raises: UsageError if they are of another model."""
