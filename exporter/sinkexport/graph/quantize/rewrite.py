"""Replace products by constant matrices, and embeddings, with quantised ones, in the form that a target runs fast."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from sinkexport.graph.matmuls import Product, find_products, find_tables, module_of
from sinkexport.quant.weight import QuantizedWeight, Rounded, WeightScheme


@dataclasses.dataclass(frozen=True)
class InputScale:
    """Static scale of a product's INT8 input. rest: of most tokens; sinks: of tokens 0 .. S-1, where it differs."""

    rest: float
    sinks: float | None = None


@dataclasses.dataclass(frozen=True)
class Treatment:
    """What becomes of one product.

    rounded: gives its matrix as it was rounded beforehand; None: it is rounded here.
    dynamic: INT8 inputs with a scale for each token, found at run time. input_scale: INT8 inputs with this scale. At
    most one of the two; neither: floating-point inputs.
    """

    scheme: WeightScheme
    rounded: Callable[[], Rounded] | None = None
    dynamic: bool = False
    input_scale: InputScale | None = None


class Plan(Protocol):
    """Which product gets which treatment; None: it stays as it is."""

    def kind(self, module: str) -> object:
        """Projections that are joined into one product must be of the same kind."""

    def divisors(self, module: str) -> npt.NDArray[np.float64] | None:
        """[K], what the input of the module is divided by, and its weights multiplied; None: nothing."""

    def product(self, product: Product) -> Treatment | None: ...

    def table(self, module: str) -> WeightScheme | None:
        """Of an embedding that is not also a product."""

    def experts(self, parameter: str) -> WeightScheme | None:
        """Of the matrices of a mixture's experts, 8 bits and a scale for each output."""


class Form(Protocol):
    """How a target writes it. Every method replaces the node, whose matrix `weight` is."""

    def weight_only(self, product: Product, weight: QuantizedWeight) -> None: ...
    def dynamic(self, product: Product, weight: QuantizedWeight) -> None: ...
    def static(self, product: Product, weight: QuantizedWeight, scale: InputScale) -> None: ...
    def gather(self, node: ir.Node, weight: QuantizedWeight) -> None: ...


def quantize(model: ir.Model, plan: Plan, form: Form) -> None:
    """Apply the plan to every product and every embedding.

    An embedding that is tied to the output projection is stored once, as the projection is.
    """
    graph = model.graph
    decided: dict[ir.Value, QuantizedWeight | None] = {}
    for product in list(find_products(graph)):
        treatment = plan.product(product)
        if treatment is None:
            decided[product.weight] = None
            continue
        weight = QuantizedWeight(
            str(product.weight.name), product.transposed, treatment.scheme, transposed=True, rounded=treatment.rounded
        )
        decided[product.weight] = weight
        if treatment.dynamic:
            form.dynamic(product, weight)
        elif treatment.input_scale is not None:
            form.static(product, weight, treatment.input_scale)
        else:
            form.weight_only(product, weight)
    for node in list(find_tables(graph)):
        table = node.inputs[0]
        if table is None or table.const_value is None:
            continue
        if table in decided:
            stored = decided[table]
        else:
            scheme = plan.table(module_of(str(table.name)))
            name = str(table.name)
            stored = None if scheme is None else QuantizedWeight(name, table.const_value, scheme, transposed=True)
        if stored is not None:
            form.gather(node, stored)
