"""Small tools that the graph passes share, on top of onnx-ir."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of `value` if every axis is known."""
    if value is None or value.shape is None or any(not isinstance(n, int) for n in value.shape):
        return None
    return tuple(int(n) for n in value.shape)  # type: ignore[arg-type]


def known_shape(value: ir.Value) -> tuple[int, ...]:
    """The shape of a value of a bundle's graph: always static.

    Raises: ValueError if it is not.
    """
    shape = static_shape(value)
    if shape is None:
        raise ValueError(f"'{value.name}' has no static shape: {value.shape}")
    return shape


def is_weight(value: ir.Value | None) -> bool:
    """Whether `value` is a constant of the graph."""
    return value is not None and value.is_initializer() and value.const_value is not None


def optional(node: ir.Node, index: int) -> ir.Value | None:
    """An input that may be absent; trailing absent ones are not even listed."""
    return node.inputs[index] if index < len(node.inputs) else None


def operand(node: ir.Node, index: int) -> ir.Value:
    """An input that must be there.

    Raises: ValueError.
    """
    value = optional(node, index)
    if value is None:
        raise ValueError(f"{node.op_type} '{node.name}' has no input {index}")
    return value


def only_user(value: ir.Value, op_type: str | None = None) -> ir.Node | None:
    """The standard operator `op_type`, or any if that is None, that alone reads `value`."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.domain:
        return None
    return uses[0].node if op_type in (None, uses[0].node.op_type) else None


def number_of(value: ir.Value) -> float | None:
    """The number that a weight of one element is; None: it is no such weight."""
    if not is_weight(value) or value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().reshape(()))


def number_times(value: ir.Value) -> tuple[ir.Node, float] | None:
    """The Mul by one number of float32 that alone reads a value and keeps its shape, and the number."""
    reader = only_user(value, "Mul")
    if reader is None:
        return None
    other = operand(reader, 1) if operand(reader, 0) is value else operand(reader, 0)
    number = number_of(other)
    if number is None or other.dtype != ir.DataType.FLOAT or known_shape(reader.outputs[0]) != known_shape(value):
        return None
    return reader, number


def split_source(parts: Sequence[ir.Value]) -> ir.Value | None:
    """What one Split cut along its last axis into just `parts`, in order; None: nothing did."""
    split = parts[0].producer()
    if split is None or split.op_type != "Split" or split.domain or list(split.outputs) != list(parts):
        return None
    axis = split.attributes["axis"].as_int() if "axis" in split.attributes else 0
    return split.inputs[0] if axis in (-1, len(known_shape(parts[0])) - 1) else None


def typed(value: ir.Value, shape: Sequence[int], dtype: ir.DataType | None) -> ir.Value:
    """Set the shape and the type of a new value, and hand it back."""
    value.shape = ir.Shape(shape)
    if dtype is not None:
        value.dtype = dtype
    return value


def constant(graph: ir.Graph, array: np.ndarray, hint: str) -> ir.Value:
    """An initializer of this content, made once however often it is asked for."""
    digest = hashlib.sha256(repr((array.dtype.str, array.shape)).encode() + array.tobytes()).hexdigest()
    name = f"const.{hint}.{digest[:12]}"
    if name not in graph.initializers:
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def lazy_weight(
    graph: ir.Graph, name: str, dtype: ir.DataType, shape: Sequence[int], make: Callable[[], np.ndarray]
) -> ir.Value:
    """An initializer that is computed while it is written, so that no second copy of the weights is ever held.

    It is made once, however often it is asked for.
    """
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.LazyTensor(lambda: ir.Tensor(make(), name=name), dtype=dtype, shape=ir.Shape(shape), name=name)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def replace_node(node: ir.Node, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value | None]) -> None:
    """Put `nodes` in the place of `node`, whose outputs `outputs` take over (graph outputs included).

    None: an output that nothing reads, which vanishes with the node.
    """
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        raise ValueError(f"'{node.name}' is not in a graph")
    graph.insert_before(node, list(nodes))
    for old, new in zip(node.outputs, outputs, strict=True):
        if new is not None:
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def drop_unused(graph: ir.Graph) -> bool:
    """Remove nodes whose results nothing reads. Returns whether there were any."""
    unused = False
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
            unused = True
    return unused
