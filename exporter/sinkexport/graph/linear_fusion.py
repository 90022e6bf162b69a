"""What matmuls of a kernel library take over from the nodes beside them, whichever library it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, TypeVar

import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import drop_unused, is_weight, known_shape, only_user, operand, replace_node


class Additive(Protocol):
    """A matmul that can add a constant [N] and then a tensor of its result's shape; a dataclass."""

    @property
    def bias(self) -> ir.Value | None:
        """The constant."""

    @property
    def residual(self) -> ir.Value | None:
        """The tensor."""

    @property
    def is_bare(self) -> bool:
        """Whether nothing follows the matmul but a bias."""


class Writable(Additive, Protocol):
    """One that is written as nodes."""

    def write(self, b: Builder) -> ir.Value:
        """Make its nodes. Returns: its result."""


Matmul = TypeVar("Matmul", bound=Additive)


def with_addition(node: ir.Node, linear: Matmul) -> tuple[ir.Node, Matmul] | None:
    """The Add that alone reads a linear, and the linear with what is added.

    What is added has the type of the result; it is a constant [N], or else as large as the result.
    """
    result = node.outputs[0]
    if (view := only_user(result, "Reshape")) is not None:
        result = view.outputs[0]
    addition = only_user(result, "Add")
    if addition is None or linear.residual is not None:
        return None
    other = addition.inputs[1] if addition.inputs[0] is result else addition.inputs[0]
    if other is None or other is result or other.dtype != result.dtype:
        return None
    shape = known_shape(result)
    if is_weight(other) and known_shape(other) == shape[-1:] and linear.bias is None and linear.is_bare:
        return addition, dataclasses.replace(linear, bias=other)  # type: ignore[type-var]
    if known_shape(other) != shape or is_weight(other):
        return None
    if view is not None and known_shape(node.outputs[0]) != shape:
        return None
    return addition, dataclasses.replace(linear, residual=other)  # type: ignore[type-var]


def take_additions(graph: ir.Graph, node: ir.Node, linear: Writable, is_linear: Callable[[ir.Node], bool]) -> bool:
    """Let a matmul take over what is added to its result, one Add after the other. Returns: whether there was any.

    is_linear: finds its node among those that it writes.
    """
    modified = False
    while (found := with_addition(node, linear)) is not None:
        addition, linear = found
        b = Builder(graph)
        out = linear.write(b)
        replace_node(addition, b.nodes, [b.reshape(out, known_shape(addition.outputs[0]))])
        drop_unused(graph)
        (node,) = (one for one in b.nodes if is_linear(one))
        modified = True
    return modified


def keeps_rows(node: ir.Node) -> bool:
    """Whether a node is a view with the rows of what it views."""
    if node.op_type != "Reshape" or node.domain:
        return False
    return known_shape(operand(node, 0))[-1:] == known_shape(node.outputs[0])[-1:]


def source_of_rows(x: ir.Value) -> ir.Node | None:
    """The node that makes x, looking through views of whole rows."""
    node = x.producer()
    while node is not None and keeps_rows(node):
        node = operand(node, 0).producer()
    return node


def is_only_input_of(x: ir.Value, is_linear: Callable[[ir.Node], bool]) -> bool:
    """Whether all that reads x, maybe through views, is a linear whose input x is."""
    if x.is_graph_output():
        return False
    for node, index in x.uses():
        is_read = is_linear(node) and index == 0
        if not is_read and not (keeps_rows(node) and is_only_input_of(node.outputs[0], is_linear)):
            return False
    return True
