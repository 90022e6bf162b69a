"""What quantisation asks: of a plan, which matmul gets which treatment; of a form, how a target writes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from sinkexport.graph.matmuls import Matmul
from sinkexport.quant.weight import QuantizedWeight, Rounded, WeightScheme


@dataclasses.dataclass(frozen=True)
class InputScale:
    """Static scale of a matmul's INT8 input. rest: of most tokens; sinks: of tokens 0 .. S-1, where it differs."""

    rest: float
    sinks: float | None = None


@dataclasses.dataclass(frozen=True)
class Treatment:
    """What becomes of one matmul.

    rounded: gives its matrix as it was rounded beforehand; None: it is rounded here. order: the input of each column of
    that, where they lie otherwise; None: they do not.
    dynamic: INT8 inputs with a scale for each token, found at run time. input_scale: INT8 inputs with this scale. At
    most one of the two; neither: floating-point inputs.
    """

    scheme: WeightScheme
    rounded: Callable[[], Rounded] | None = None
    dynamic: bool = False
    input_scale: InputScale | None = None
    order: npt.NDArray[np.int64] | None = None


Use = Literal["table", "experts"]
"""What rows are that no matmul of `treatment` has: a table, or the outputs of all experts of a layer."""


class Plan(Protocol):
    """Which matmul gets which treatment; None: it stays as it is."""

    def kind(self, module: str) -> object:
        """The kind of a projection: only those of one kind are joined into one matmul."""

    def divisors(self, module: str) -> npt.NDArray[np.float64] | None:
        """[K], what the input of the module is divided by, and its weights multiplied; None: nothing."""

    def treatment(self, matmul: Matmul) -> Treatment | None: ...

    def is_bfloat16(self, module: str) -> bool:
        """Whether weights that stay in floating point are rounded to bfloat16."""

    def table(self, module: str) -> WeightScheme | None:
        """Scheme of an embedding that no matmul reads."""

    def experts(self, parameter: str) -> WeightScheme | None:
        """Scheme of the matrices of MoE experts: 8 bits and a scale for each output."""


@runtime_checkable
class RowPlan(Protocol):
    """A plan that knows the integers of rows by their numbers."""

    def of_rows(self, name: str, rows: ir.TensorProtocol, use: Use) -> Treatment | None: ...


def treatment_of_rows(plan: Plan, name: str, rows: ir.TensorProtocol, use: Use) -> Treatment | None:
    """What becomes of rows [n, K]. name: the module of a table, the parameter of experts."""
    if isinstance(plan, RowPlan):
        return plan.of_rows(name, rows, use)
    scheme = plan.table(name) if use == "table" else plan.experts(name)
    return None if scheme is None else Treatment(scheme)


class Form(Protocol):
    """How a target writes it. Every method replaces the node, whose matrix `weight` is."""

    def weight_only(self, matmul: Matmul, weight: QuantizedWeight) -> None: ...
    def dynamic(self, matmul: Matmul, weight: QuantizedWeight) -> None: ...
    def static(self, matmul: Matmul, weight: QuantizedWeight, scale: InputScale) -> None: ...
    def gather(self, node: ir.Node, weight: QuantizedWeight) -> None: ...
