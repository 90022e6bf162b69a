"""Find weights between two parts of the queries' rotation (Hunyuan; families/weights_after.py says why they are there).

A query turns to its place in the cache, is multiplied by its weight and by that of keys, and turns on by the tokens
that lie between that place and its position in the stream.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from sinkexport.graph.edit import is_weight, known_shape, operand, optional
from sinkexport.graph.operators import STREAM_ANGLES, Input
from sinkexport.graph.spelled_activations import TOLERANCE, computed

MOST_WEIGHTS = 2
PLACE, SHIFT = 0.7, 0.4
"""Angles by which expressions of cos and sin are tried: any would do."""


@dataclasses.dataclass(frozen=True)
class TurnedWeight:
    """x: queries before both rotations. weights: one or two, float32 [D]. frequency: int64 [R/2], constant."""

    x: ir.Value
    weights: tuple[ir.Value, ...]
    frequency: np.ndarray
    interleaved: bool


def find_turned_weight(attention: ir.Node) -> TurnedWeight | None:
    """The weights of a traced node's queries; None: they have none."""
    second = _rotation(operand(attention, Input.Q))
    shift = None if second is None else _angles(operand(second, 1), operand(second, 2))
    if second is None or shift is None or shift.attributes["behind"].as_int() == 0:
        return None
    if optional(attention, Input.SHIFT_COS) not in (None, operand(second, 1)):
        return None
    turned, weights = _without_weights(operand(second, 0))
    first = _rotation(turned)
    if first is None or not 1 <= len(weights) <= MOST_WEIGHTS:
        return None
    interleaved = [_is_interleaved(node) for node in (first, second)]
    frequency = operand(shift, 1).const_value
    if interleaved[0] != interleaved[1] or frequency is None or not _is_of_place(first, shift):
        return None
    return TurnedWeight(operand(first, 0), weights, frequency.numpy(), interleaved[0])


def _without_weights(value: ir.Value) -> tuple[ir.Value, tuple[ir.Value, ...]]:
    """What is multiplied by weights [D], and these, the first one first."""
    weights: list[ir.Value] = []
    while (node := value.producer()) is not None and node.op_type == "Mul" and not node.domain:
        given = [operand(node, 0), operand(node, 1)]
        found = [each for each in given if is_weight(each) and known_shape(each) == known_shape(value)[-1:]]
        if len(found) != 1 or found[0].dtype != ir.DataType.FLOAT:
            break
        weights.insert(0, found[0])
        value = given[0] if given[1] is found[0] else given[1]
    return value, tuple(weights)


def _rotation(value: ir.Value) -> ir.Node | None:
    node = value.producer()
    return node if node is not None and node.op_type == "RotaryEmbedding" and not node.domain else None


def _is_interleaved(node: ir.Node) -> bool:
    return bool(node.attributes["interleaved"].as_int()) if "interleaved" in node.attributes else False


def _angles(cos: ir.Value, sin: ir.Value) -> ir.Node | None:
    """The node whose cos and sin these are."""
    node = cos.producer()
    if node is None or node.op_type != STREAM_ANGLES or list(node.outputs) != [cos, sin]:
        return None
    return node


def _is_of_place(rotation: ir.Node, shift: ir.Node) -> bool:
    """Whether a rotation is by the angles of a position less those of `shift`, written as sums of products."""
    cos, sin = operand(rotation, 1), operand(rotation, 2)
    own = next((n for n in map(_source, _leaves(cos)) if n is not None and n is not shift), None)
    if own is None or own.attributes["behind"].as_int() != 0 or operand(own, 1) is not operand(shift, 1):
        return False
    position = PLACE + SHIFT
    known = {
        **dict(zip(own.outputs, (np.cos(position), np.sin(position)), strict=True)),
        **dict(zip(shift.outputs, (np.cos(SHIFT), np.sin(SHIFT)), strict=True)),
    }
    if not (_leaves(cos) | _leaves(sin)) <= known.keys():
        return False
    found = [computed(value, dict(known)) for value in (cos, sin)]
    return bool(np.allclose(found, [np.cos(PLACE), np.sin(PLACE)], atol=TOLERANCE))


def _source(value: ir.Value) -> ir.Node | None:
    node = value.producer()
    return node if node is not None and node.op_type == STREAM_ANGLES else None


def _leaves(value: ir.Value) -> set[ir.Value]:
    """What a sum, difference or product is made of."""
    node = value.producer()
    if node is None or node.domain or node.op_type not in ("Add", "Sub", "Mul"):
        return {value}
    return {leaf for each in node.inputs if each is not None for leaf in _leaves(each)}
