"""Replace products by constant matrices, and embeddings, with quantised ones, in the form that a target runs fast."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np
import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import is_weight, known_shape, lazy_weight
from sinkexport.graph.passes.products import Product, find_products, find_tables, module_of
from sinkexport.graph.passes.quantized_weight import QuantizedWeight, WeightScheme


@dataclasses.dataclass(frozen=True)
class InputScale:
    """Static scale of a product's INT8 input. rest: of most tokens; sinks: of tokens 0 .. S-1, where it differs."""

    rest: float
    sinks: float | None = None


@dataclasses.dataclass(frozen=True)
class Treatment:
    """What becomes of one product.

    dynamic: INT8 inputs with a scale for each token, found at run time. input_scale: INT8 inputs with this scale. At
    most one of the two; neither: floating-point inputs.
    smooth: float32 [K], the input is divided by it and the weights multiplied (SmoothQuant, arXiv:2211.10438).
    """

    scheme: WeightScheme
    dynamic: bool = False
    input_scale: InputScale | None = None
    smooth: np.ndarray | None = None


class Plan(Protocol):
    """Which product gets which treatment; None: it stays as it is."""

    def kind(self, module: str) -> object:
        """Projections that are joined into one product must be of the same kind."""

    def product(self, product: Product) -> Treatment | None: ...

    def table(self, module: str) -> WeightScheme | None:
        """Of an embedding that is not also a product."""


class Form(Protocol):
    """How a target writes it. Every method replaces the node, `weight` being its matrix, smoothed already."""

    def weight_only(self, product: Product, weight: QuantizedWeight) -> None: ...
    def dynamic(self, product: Product, weight: QuantizedWeight) -> None: ...
    def static(self, product: Product, weight: QuantizedWeight, scale: InputScale) -> None: ...
    def gather(self, node: ir.Node, weight: QuantizedWeight) -> None: ...


def quantize(model: ir.Model, plan: Plan, form: Form) -> None:
    """Apply the plan to every product and every embedding.

    An embedding that is tied to the output projection is stored once, as the projection is.
    """
    graph = model.graph
    tables: dict[ir.Value, QuantizedWeight] = {}
    for product in list(find_products(graph)):
        treatment = plan.product(product)
        if treatment is None:
            continue
        weight = QuantizedWeight(
            str(product.weight.name), product.transposed, treatment.scheme, transposed=True,
            input_scale=treatment.smooth,
        )  # fmt: skip
        if product.is_table:
            tables[product.weight] = weight
        if treatment.smooth is not None:
            product = _smoothed(graph, product, treatment.smooth)
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
        if table not in tables:
            scheme = plan.table(module_of(str(table.name)))
            if scheme is None:
                continue
            tables[table] = QuantizedWeight(str(table.name), table.const_value, scheme, transposed=True)
        form.gather(node, tables[table])


def _smoothed(graph: ir.Graph, product: Product, smooth: np.ndarray) -> Product:
    """Divide the product's input by `smooth`: in the norm that it comes from, if nothing else reads that."""
    norm = product.x.producer()
    inverse = (1.0 / smooth).astype(product.x.dtype.numpy())  # type: ignore[union-attr]
    if norm is not None and norm.op_type in ("RMSNormalization", "LayerNormalization") and _is_alone(product.x):
        for index in range(1, len(norm.inputs)):
            factor = norm.inputs[index]
            if factor is not None:
                norm.replace_input_with(index, _scaled(graph, factor, inverse, str(product.weight.name)))
        return product
    b = Builder(graph)
    factor = lazy_weight(graph, f"{product.weight.name}.inverse_smooth", product.x.dtype,  # type: ignore[arg-type]
                         inverse.shape, lambda: inverse)  # fmt: skip
    divided = b.op("Mul", [product.x, factor])
    graph.insert_before(product.node, b.nodes)
    product.node.replace_input_with(0, divided)
    return dataclasses.replace(product, x=divided)


def _is_alone(value: ir.Value) -> bool:
    norm = value.producer()
    factors = [] if norm is None else norm.inputs[1:]
    return (
        len(value.uses()) == 1
        and not value.is_graph_output()
        and all(factor is None or (is_weight(factor) and len(known_shape(factor)) == 1) for factor in factors)
    )


def _scaled(graph: ir.Graph, factor: ir.Value, inverse: np.ndarray, name: str) -> ir.Value:
    """A norm's weight (or bias) [K] times `inverse` [K]."""
    source = factor.const_value
    if source is None or factor.dtype is None:
        raise ValueError(f"'{factor.name}' has no content")
    return lazy_weight(graph, f"{factor.name}/smooth({name})", factor.dtype, inverse.shape,
                       lambda: (source.numpy() * inverse).astype(inverse.dtype))  # fmt: skip
