"""Find root-mean-square norms (arXiv:1910.07467) and layer norms that models spell out in six operators or more."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir

from sinkexport.graph.edit import is_weight, known_shape, only_user, operand, static_shape


@dataclasses.dataclass(frozen=True)
class RmsNorm:
    """One match: ``scale * x / sqrt(mean(x^2) + epsilon)``, ending in node `last`, which scales.

    Types may differ: x is taken before a cast to float32, scale and the result as `last` has them.
    """

    x: ir.Value
    scale: ir.Value
    epsilon: float
    last: ir.Node


@dataclasses.dataclass(frozen=True)
class RowNorm:
    """A node RMSNormalization over the last axis of x, in float32. scale: [K]."""

    x: ir.Value
    scale: ir.Value
    epsilon: float


def row_norm(node: ir.Node | None) -> RowNorm | None:
    """What `node` normalises, if it is such a norm."""
    if node is None or node.op_type != "RMSNormalization" or node.domain:
        return None
    x, scale = operand(node, 0), operand(node, 1)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    shape = known_shape(x)
    if axis not in (-1, len(shape) - 1) or known_shape(scale) != shape[-1:]:
        return None
    if x.dtype != ir.DataType.FLOAT or scale.dtype != ir.DataType.FLOAT:
        return None
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    return RowNorm(x, scale, epsilon)


def find_rms_norms(graph: ir.Graph, *, with_powers: bool = False) -> Iterator[RmsNorm]:
    """Every norm over the last axis. One that was found may be replaced before the next is asked for.

    Follows values, not names, and looks through the casts to float32 and back that half-precision models have.
    with_powers: also norms that write 1 / sqrt(..) as a power of -1/2 (Gemma 3n and 4).
    """
    for node in list(graph):
        if node.op_type == "ReduceMean" and (norm := _match(node, with_powers=with_powers)) is not None:
            yield norm


def find_unscaled_norms(graph: ir.Graph) -> Iterator[tuple[ir.Value, float, ir.Node]]:
    """Every float32 norm over the last axis that nothing scales (values of Gemma 4): x, epsilon, the last node."""
    for node in list(graph):
        found = _unscaled(node, with_powers=True) if node.op_type == "ReduceMean" and not node.domain else None
        if found is not None and found.x.dtype == ir.DataType.FLOAT:
            yield found.x, found.epsilon, found.last


def find_layer_norms(graph: ir.Graph) -> Iterator[RmsNorm]:
    """Every layer norm without a bias over the last axis (Cohere), likewise: x is what the mean is taken off."""
    for node in list(graph):
        norm = _match(node, _is_same_difference) if node.op_type == "ReduceMean" and not node.domain else None
        if norm is not None and (x := _without_mean(norm.x)) is not None:
            yield dataclasses.replace(norm, x=x)


def _without_mean(centred: ir.Value) -> ir.Value | None:
    """x, if a value is ``x - mean(x)``."""
    node = centred.producer()
    if node is None or node.op_type != "Sub" or node.domain:
        return None
    x, mean = operand(node, 0), operand(node, 1).producer()
    if mean is None or mean.op_type != "ReduceMean" or mean.domain or mean.inputs[0] is not x:
        return None
    return x if _over_last_axis(mean) else None


def _is_same_difference(a: ir.Value | None, b: ir.Value | None) -> bool:
    """Whether two values are one, or are computed as one difference: models write it twice."""
    if a is b or a is None or b is None:
        return a is b
    one, other = a.producer(), b.producer()
    if one is None or other is None or (one.op_type, one.domain) != ("Sub", ""):
        return False
    return (other.op_type, other.domain) == ("Sub", "") and list(one.inputs) == list(other.inputs)


def _inverse_root(value: ir.Value, *, with_powers: bool) -> ir.Node | None:
    """The node that ends ``1 / sqrt(value)``."""
    root = only_user(value, "Sqrt")
    if root is not None:
        return only_user(root.outputs[0], "Reciprocal")
    power = only_user(value, "Pow") if with_powers else None
    return power if power is not None and power.inputs[0] is value and _number(power.inputs[1]) == -0.5 else None


@dataclasses.dataclass(frozen=True)
class _Unscaled:
    """``x / sqrt(mean(x^2) + epsilon)``, ending in node `last`. result: in the type that is scaled."""

    x: ir.Value
    epsilon: float
    last: ir.Node
    result: ir.Value


def _unscaled(
    mean: ir.Node, is_same: Callable[[Any, Any], bool] = operator.is_, *, with_powers: bool = False
) -> _Unscaled | None:
    square = mean.inputs[0].producer() if mean.inputs[0] is not None else None
    source = _squared(square)
    if source is None or not _over_last_axis(mean):
        return None
    addition = only_user(mean.outputs[0], "Add")
    epsilon = _number(next((v for v in addition.inputs if is_weight(v)), None)) if addition else None
    inverse = _inverse_root(addition.outputs[0], with_powers=with_powers) if addition else None
    scaled = only_user(inverse.outputs[0], "Mul") if inverse else None
    if epsilon is None or scaled is None or not any(is_same(source, value) for value in scaled.inputs):
        return None
    cast = only_user(scaled.outputs[0], "Cast")
    return _Unscaled(source, epsilon, scaled, (cast or scaled).outputs[0])


def _match(
    mean: ir.Node, is_same: Callable[[Any, Any], bool] = operator.is_, *, with_powers: bool = False
) -> RmsNorm | None:
    found = _unscaled(mean, is_same, with_powers=with_powers)
    scaling = None if found is None else only_user(found.result, "Mul")
    if found is None or scaling is None:
        return None
    scale = scaling.inputs[1] if scaling.inputs[0] is found.result else scaling.inputs[0]
    width = static_shape(found.x)
    if scale is None or width is None or static_shape(scale) != width[-1:]:
        return None
    return RmsNorm(_before_cast(found.x), scale, found.epsilon, scaling)


def _squared(node: ir.Node | None) -> ir.Value | None:
    """x, if `node` computes x^2."""
    if node is None or len(node.inputs) != 2:
        return None
    base, exponent = node.inputs
    if node.op_type == "Pow" and _number(exponent) == 2.0:
        return base
    return base if node.op_type == "Mul" and base is exponent else None


def _over_last_axis(mean: ir.Node) -> bool:
    before, after = static_shape(mean.inputs[0]), static_shape(mean.outputs[0])
    return before is not None and after == (*before[:-1], 1)


def _number(value: ir.Value | None) -> float | None:
    """The value of a one-element constant."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().reshape(()))


def _before_cast(value: ir.Value) -> ir.Value:
    node = value.producer()
    if node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        return node.inputs[0]
    return value
