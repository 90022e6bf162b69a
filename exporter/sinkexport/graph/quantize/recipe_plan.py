"""A recipe applied to a model: what becomes of each of its matmuls and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sinkexport.graph.matmuls import Matmul
from sinkexport.graph.quantize.plan import InputScale, Treatment
from sinkexport.model.moe_layers import moe_layers, routers
from sinkexport.quant.ranges import Ranges
from sinkexport.quant.recipe import Recipe
from sinkexport.quant.weight import Rounded, WeightScheme

HIGHEST = 127
"""The bound of a static range is this integer."""


class RecipePlan:
    """Answers what the graph pass asks. model: whose modules the recipe is applied to.

    The output projection always takes floating-point inputs: its matmul decides the next token directly, and its
    weights may be the embedding's.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Any,
        dtype: Literal["float32", "float16"],
        calibration: Ranges | None = None,
    ) -> None:
        self._recipe = recipe
        self._calibration = calibration
        self._routers = routers(model)
        self._moe_prefixes = tuple(f"{path}." for path in moe_layers(model))
        self._scale_dtype: Literal["float32", "float16"] = dtype
        head = model.get_output_embeddings().weight
        # By all its names: a tied weight has that of the embedding as well.
        self._head = frozenset(
            name for name, module in model.named_modules() if getattr(module, "weight", None) is head
        )

    def kind(self, module: str) -> object:
        """Projections are joined if they are rounded alike."""
        return self._scheme(module), self._recipe.input_mode(module), self.is_bfloat16(module)

    def treatment(self, matmul: Matmul) -> Treatment | None:
        """What becomes of a matmul; its modules are all of one kind."""
        scheme = self._scheme(matmul.modules[0])
        if scheme is None:
            return None
        rounded = self._rounded(matmul)
        mode = self._recipe.input_mode(matmul.modules[0])
        if mode == "float" or matmul.modules[0] in self._head:
            return Treatment(scheme, rounded)
        if mode == "dynamic":
            return Treatment(scheme, rounded, dynamic=True)
        return Treatment(scheme, rounded, input_scale=self._input_scale(matmul.modules))

    def scheme_for_inputs(self, module: str) -> WeightScheme | None:
        """How a module's weights are to be rounded with GPTQ; None: they are not."""
        return None if module in self._head or not self._recipe.rounds_for_inputs else self._scheme(module)

    def divisors(self, module: str) -> npt.NDArray[np.float64] | None:
        """What an input is divided by: nothing where none of its readers gains by it."""
        calibration = self._calibration
        if self._recipe.smooth is None or calibration is None or module in self._head | self._routers:
            return None
        if not any(self._is_smoothed(reader) for reader in calibration.readers(module)):
            return None
        return calibration.divisors(module)

    def _is_smoothed(self, module: str) -> bool:
        """Only weights are rounded where an input stays in floating point: a larger spread would harm them."""
        weights_only = self._recipe.activations.mode == "float"
        return self._scheme(module) is not None and (weights_only or self._recipe.input_mode(module) != "float")

    def is_bfloat16(self, module: str) -> bool:
        """Whether a module is rounded to bfloat16: all that is rounded to no integers, but routers and what the recipe
        keeps."""
        if self._recipe.floats != "bfloat16" or self._recipe.keeps_float(module) or module in self._routers:
            return False
        return module not in self._head or self._recipe.lm_head != "float"

    def table(self, module: str) -> WeightScheme | None:
        """How an untied embedding is rounded: a scale for each row, as its rows are what is read.

        Biases of MoE experts, whose rows are gathered too, are none.
        """
        if self._recipe.embeddings == "float" or self._recipe.keeps_float(module):
            return None
        if module.startswith(self._moe_prefixes):
            return None
        return WeightScheme(8, scale_dtype=self._scale_dtype)

    def experts(self, parameter: str) -> WeightScheme | None:
        """The one form that experts have, whatever the bits and blocks of other weights."""
        weights = self._recipe.weights
        if weights is None or self._recipe.keeps_float(parameter):
            return None
        return WeightScheme(8, scales=weights.scales)

    def _scheme(self, module: str) -> WeightScheme | None:
        """None: the module stays in floating point. Routers always do: they are small, and decide who is asked."""
        recipe = self._recipe
        if recipe.keeps_float(module) or module in self._routers:
            return None
        if module in self._head and recipe.lm_head != "same":
            return None if recipe.lm_head == "float" else WeightScheme(8, scale_dtype=self._scale_dtype)
        weights = recipe.weights
        if weights is None:
            return None
        bits = recipe.weight_bits(module)
        # What has more bits than the rest needs no zero points: as 8 bits everywhere else.
        symmetric = weights.symmetric or bits != weights.bits
        return WeightScheme(bits, weights.block_size, symmetric, weights.scales, self._scale_dtype)

    def _rounded(self, matmul: Matmul) -> Callable[[], Rounded] | None:
        """What calibration rounded a matmul's weights to; None: it did not."""
        calibration, scheme = self._calibration, self.scheme_for_inputs(matmul.modules[0])
        if calibration is None or scheme is None:
            return None

        def read() -> Rounded:
            parts = [calibration.rounded(module, scheme, matmul.depth) for module in matmul.modules]
            zeros = [part.zero_points for part in parts if part.zero_points is not None]
            return Rounded(
                np.concatenate([part.integers for part in parts]),
                np.concatenate([part.scales for part in parts]),
                np.concatenate(zeros) if zeros else None,
            )

        return read

    def _input_scale(self, modules: tuple[str, ...]) -> InputScale:
        calibration, activations = self._calibration, self._recipe.activations
        if calibration is None:
            raise ValueError("static ranges without a calibration")
        # Projections that are joined read one input: their ranges are the same.
        found = calibration.input_range(modules[0])
        if activations.sinks == "included":
            return InputScale(_scale(found.all))
        if activations.sinks == "excluded" or found.sinks is None or found.sinks <= found.rest:
            return InputScale(_scale(found.rest))
        return InputScale(_scale(found.rest), _scale(found.sinks))


def _scale(bound: float) -> float:
    """Scale of an input with this bound. For one that was nothing but zeros any scale is right."""
    return (bound or 1.0) / HIGHEST
