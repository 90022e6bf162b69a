"""Find gates of feed-forward blocks, ``activation(gate) * up``, and activations without one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from sinkexport.graph.edit import is_weight, known_shape, only_user

SILU, GELU, GELU_TANH, RELU2 = "silu", "gelu", "gelu_tanh", "relu2"


@dataclasses.dataclass(frozen=True)
class Active:
    """``activation(x)``, ending in node `last`."""

    x: ir.Value
    activation: str
    last: ir.Node


@dataclasses.dataclass(frozen=True)
class Gate:
    """``activation(gate) * up``, ending in node `last`; all of one shape and type."""

    gate: ir.Value
    up: ir.Value
    activation: str
    last: ir.Node


def find_activations(graph: ir.Graph) -> Iterator[Active]:
    """Every activation. One that was found may be replaced before the next is asked for."""
    for node in list(graph):
        if (found := _active(node)) is not None:
            yield found


def gate_of(found: Active) -> Gate | None:
    """The gate that an activation is a part of; None: nothing multiplies it, or something else reads it."""
    active = found.last.outputs[0]
    last = only_user(active, "Mul")
    if last is None:
        return None
    up = last.inputs[1] if last.inputs[0] is active else last.inputs[0]
    if up is None or up is active or up.dtype != found.x.dtype or known_shape(up) != known_shape(found.x):
        return None
    return Gate(found.x, up, found.activation, last)


def _active(node: ir.Node) -> Active | None:
    """The activation that begins with `node`."""
    if node.domain or not node.inputs or node.inputs[0] is None:
        return None
    x = node.inputs[0]
    if node.op_type == "Gelu":
        approximate = node.attributes["approximate"].as_string() if "approximate" in node.attributes else "none"
        return Active(x, GELU_TANH if approximate == "tanh" else GELU, node)
    if node.op_type == "Sigmoid":
        last = only_user(node.outputs[0], "Mul")
        return Active(x, SILU, last) if last is not None and x in last.inputs else None
    if node.op_type == "Relu":
        last = only_user(node.outputs[0], "Pow")
        return Active(x, RELU2, last) if last is not None and _is_two(last.inputs[1]) else None
    return None


def _is_two(value: ir.Value | None) -> bool:
    if value is None or not is_weight(value) or value.const_value is None or value.const_value.size != 1:
        return False
    return float(value.const_value.numpy().reshape(())) == 2.0
