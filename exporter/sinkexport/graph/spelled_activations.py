"""Find activations by what they compute: models spell GELU out in many ways (Phi, Bloom, GPT-J).

What is computed of one value alone, element by element and with constants of one number, is a function. It is compared
with the activations that are known at many points.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from sinkexport.graph.edit import known_shape, number_of
from sinkexport.graph.gates import GELU, GELU_TANH, RELU2, SILU, Active

CLAMPED_SWIGLU = "clamped_swiglu"
"""``g sigmoid(1.702 g) (u + 1)`` of a gate g = min(gate, limit) and an up u within -limit .. limit (gpt-oss)."""

MOST_NODES = 16
"""Nodes that an activation is spelled out in at most."""

TOLERANCE = 1e-6
"""Largest error at a point, of the number or of 1 where the number is smaller: constants are rounded to float32."""

Numbers = Callable[..., np.ndarray]

_OPERATORS: Mapping[str, Numbers] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Neg": np.negative,
    "Exp": np.exp,
    "Tanh": np.tanh,
    "Erf": np.vectorize(math.erf, otypes=[float]),
    "Relu": functools.partial(np.maximum, 0.0),
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Clip": lambda x, low=None, high=None: np.clip(x, low, high),
}
"""Operators that work element by element."""


def find_activations_of(x: ir.Value) -> Iterator[tuple[Active, frozenset[ir.Node]]]:
    """Values that are an activation of x, and the nodes that compute them, the smallest first.

    Nothing else reads x or what is between.
    """
    for node, nodes in _closed_readers((x,)):
        name = _name(x, node.outputs[0])
        if name is not None:
            yield Active(x, name, node), nodes


@dataclasses.dataclass(frozen=True)
class SpelledGate:
    """``activation(gate) * up``, or what an activation of both is (`CLAMPED_SWIGLU`), ending in node `last`."""

    activation: str
    limit: float
    last: ir.Node


def find_gate_of(gate: ir.Value, up: ir.Value) -> SpelledGate | None:
    """The gated activation of two values that nothing else reads."""
    if known_shape(gate) != known_shape(up) or gate.dtype != up.dtype:
        return None
    for node, nodes in _closed_readers((gate, up)):
        result = node.outputs[0]
        if known_shape(result) != known_shape(gate) or result.dtype != gate.dtype:
            continue
        ends = [value for each in nodes if each.op_type == "Clip" for value in each.inputs[1:] if value is not None]
        limits = {abs(number) for number in map(number_of, ends) if number}
        found = _gated_name((gate, up), result, limits)
        if found is not None:
            return SpelledGate(*found, node)
    return None


def _gated_name(pair: tuple[ir.Value, ir.Value], result: ir.Value, limits: set[float]) -> tuple[str, float] | None:
    """The activation of gate and up, and its limit."""
    gates, ups = np.meshgrid(*[np.concatenate([np.linspace(-12, 12, 97), [-1e3, 1e3]])] * 2)
    with np.errstate(all="ignore"):
        got = computed(result, {pair[0]: gates, pair[1]: ups})
        for name, activation in _ACTIVATIONS.items():
            if _is_close(got, activation(gates) * ups):
                return name, 0.0
        for limit in limits if len(limits) == 1 else ():
            g, u = np.minimum(gates, limit), np.clip(ups, -limit, limit)
            if _is_close(got, g / (1 + np.exp(-1.702 * g)) * (u + 1)):
                return CLAMPED_SWIGLU, limit
    return None


def _is_close(got: np.ndarray, want: np.ndarray) -> bool:
    return bool(np.all(np.abs(got - want) <= TOLERANCE * np.maximum(np.abs(want), 1)))


def _closed_readers(sources: tuple[ir.Value, ...]) -> Iterator[tuple[ir.Node, frozenset[ir.Node]]]:
    """Nodes that compute of all sources and constants alone, and the nodes on the way, which alone read the sources."""
    known: dict[ir.Value, frozenset[ir.Node]] = {source: frozenset() for source in sources}
    for node in _readers_in_order(sources, known):
        nodes = known[node.outputs[0]]
        if all(_is_closed(source, node, nodes) for source in sources):
            yield node, nodes


def _readers_in_order(sources: tuple[ir.Value, ...], known: dict[ir.Value, frozenset[ir.Node]]) -> Iterator[ir.Node]:
    """Nodes that compute of the sources and constants alone, each after those whose results it reads."""
    waiting = [use.node for source in sources for use in source.uses()]
    while waiting and len(known) <= MOST_NODES:
        node = waiting.pop(0)
        if node.outputs[0] in known or not _is_elementwise(node, known):
            continue
        before = (known[value] for value in node.inputs if value in known)
        known[node.outputs[0]] = frozenset((node,)).union(*before)
        yield node
        waiting += [use.node for use in node.outputs[0].uses()]


def _is_elementwise(node: ir.Node, known: Mapping[ir.Value, object]) -> bool:
    if node.domain or node.op_type not in (*_OPERATORS, "Gelu"):
        return False
    given = [value for value in node.inputs if value is not None]  # a Clip may have no lower end
    return all(value in known or number_of(value) is not None for value in given)


def _is_closed(x: ir.Value, last: ir.Node, nodes: frozenset[ir.Node]) -> bool:
    """Whether x and what is on the way to the last node are read on that way alone."""
    values = [x, *(node.outputs[0] for node in nodes if node is not last)]
    return not any(value.is_graph_output() or any(use.node not in nodes for use in value.uses()) for value in values)


def _name(x: ir.Value, result: ir.Value) -> str | None:
    """The activation that `result` is of x."""
    if known_shape(result) != known_shape(x) or result.dtype != x.dtype:
        return None
    points = _points()
    with np.errstate(all="ignore"):
        got = computed(result, {x: points})
        for name, activation in _ACTIVATIONS.items():
            if _is_close(got, activation(points)):
                return name
    return None


@functools.cache
def _points() -> np.ndarray:
    """Where functions are compared: close to each other where activations bend, and far out."""
    far = np.geomspace(12, 1e12, 200)
    return np.concatenate([-far, np.linspace(-12, 12, 4801), far])


def computed(value: ir.Value, known: dict[ir.Value, np.ndarray]) -> np.ndarray:
    """What a value is for given ones, by operators that work element by element. known: grows."""
    if value in known:
        return known[value]
    number, node = number_of(value), value.producer()
    if number is not None:
        return np.asarray(number)
    if node is None:
        raise ValueError(f"'{value.name}' is not computed")
    given = [None if each is None else computed(each, known) for each in node.inputs]
    if node.op_type == "Gelu":
        is_tanh = "approximate" in node.attributes and node.attributes["approximate"].as_string() == "tanh"
        known[value] = (_gelu_tanh if is_tanh else _gelu)(given[0])  # type: ignore[arg-type]
    else:
        known[value] = _OPERATORS[node.op_type](*given)
    return known[value]


def _gelu(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * x * np.vectorize(math.erfc, otypes=[float])(-x / math.sqrt(2)))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


_ACTIVATIONS: Mapping[str, Numbers] = {
    SILU: lambda x: x / (1 + np.exp(-x)),
    GELU: _gelu,
    GELU_TANH: _gelu_tanh,
    RELU2: lambda x: np.square(np.maximum(x, 0)),
}
