"""How many bytes of weights one decode step has to read, from the graph's file alone.

A bundle's graph is an ONNX file; this reads the few fields that matter straight from its protobuf encoding, so that
measuring a bundle needs nothing but the runtime. Source: https://protobuf.dev/programming-guides/encoding and
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto for the field numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from sinkrt.errors import BundleError, problem

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
MODEL_GRAPH = 7
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_VALUE_INFO = 1, 5, 13
NODE_INPUT, NODE_OUTPUT, NODE_OP_TYPE = 1, 2, 4
TENSOR_DIMS, TENSOR_DATA_TYPE, TENSOR_NAME = 1, 2, 8
VALUE_NAME, VALUE_TYPE, TYPE_TENSOR, TENSOR_SHAPE, SHAPE_DIM, DIM_VALUE = 1, 2, 1, 2, 1, 1
# Bits of an element by TensorProto.DataType; strings and complex numbers are no weights.
ELEMENT_BITS = {
    1: 32,
    2: 8,
    3: 8,
    4: 16,
    5: 16,
    6: 32,
    7: 64,
    9: 8,
    10: 16,
    11: 64,
    12: 32,
    13: 64,
    16: 16,
    17: 8,
    18: 8,
    19: 8,
    20: 8,
    21: 4,
    22: 4,
    23: 4,
    24: 8,
}

EXPERT_PRODUCTS = ("HalfExpertLinear", "Int8ExpertLinear")
"""Of the TensorRT plugin: inputs, matrices (and scales) of all experts, which are chosen."""


def weight_bytes_per_step(graph_file: Path) -> int:
    """Bytes of weights that one run of the graph has to read.

    Every initializer once, but of one that is only gathered from just the rows: of an untied embedding nothing that
    counts, of a mixture's experts, matrices each, those that are chosen, as many as a run can choose at most. So it is
    of matrices and scales that a node of the TensorRT plugin reads where they lie.

    Raises: BundleError if the file is no ONNX graph.
    """
    try:
        data = memoryview(graph_file.read_bytes())
        graph = next(value for field, value in _fields(data) if field == MODEL_GRAPH)
        return _weight_bytes(_as_bytes(graph))
    except (OSError, StopIteration, ValueError, IndexError) as error:
        raise BundleError(
            problem(
                graph_file.name,
                received=f"a file that is no ONNX graph ({type(error).__name__})",
                expected="a graph that 'sinkexport export' wrote",
                fix="export the model again",
            )
        ) from None


def _weight_bytes(graph: memoryview) -> int:
    sizes: dict[str, tuple[list[int], int]] = {}
    shapes: dict[str, list[int]] = {}
    read_whole: set[str] = set()
    gathered: dict[str, str] = {}  # by initializer, what is gathered of it
    chosen: dict[str, str] = {}  # by initializer, the rows that a product by chosen experts gives
    for field, value in _fields(graph):
        if field == GRAPH_NODE:
            op_type, inputs, outputs = _node(_as_bytes(value))
            if op_type == "Gather":
                gathered[inputs[0]] = outputs[0]
                read_whole.update(inputs[1:])
            elif op_type in EXPERT_PRODUCTS:
                chosen |= dict.fromkeys(inputs[1:-1], outputs[0])
                read_whole.update((inputs[0], inputs[-1]))
            else:
                read_whole.update(inputs)
        elif field == GRAPH_INITIALIZER:
            name, dims, bits = _tensor(_as_bytes(value))
            sizes[name] = dims, bits
        elif field == GRAPH_VALUE_INFO:
            name, shape = _value(_as_bytes(value))
            shapes[name] = shape
    total = 0
    for name, (dims, bits) in sizes.items():
        if name in read_whole:
            total += math.prod(dims) * bits // 8
        elif name in chosen or (name in gathered and len(dims) > 2):
            # Of an axis of experts, what as many picks as the result has rows can choose.
            picks, *_ = shapes.get(chosen.get(name) or gathered[name], dims)
            total += min(picks, dims[0]) * math.prod(dims[1:]) * bits // 8
    return total


def _node(node: memoryview) -> tuple[str, list[str], list[str]]:
    """Operator, names of inputs and of outputs."""
    op_type, inputs, outputs = "", [], []
    for field, value in _fields(node):
        if field == NODE_INPUT:
            inputs.append(str(_as_bytes(value), "utf-8"))
        elif field == NODE_OUTPUT:
            outputs.append(str(_as_bytes(value), "utf-8"))
        elif field == NODE_OP_TYPE:
            op_type = str(_as_bytes(value), "utf-8")
    return op_type, inputs, outputs


def _value(info: memoryview) -> tuple[str, list[int]]:
    """Name and shape, which is static."""
    name, shape = "", []
    for field, value in _fields(info):
        if field == VALUE_NAME:
            name = str(_as_bytes(value), "utf-8")
        elif field == VALUE_TYPE:
            dims = _inside(_inside(_as_bytes(value), TYPE_TENSOR), TENSOR_SHAPE)
            shape = [_number(_as_bytes(dim), DIM_VALUE) for field, dim in _fields(dims) if field == SHAPE_DIM]
    return name, shape


def _inside(message: memoryview, wanted: int) -> memoryview:
    """A message's part of that field number, empty if there is none."""
    return next((_as_bytes(value) for field, value in _fields(message) if field == wanted), memoryview(b""))


def _number(message: memoryview, wanted: int) -> int:
    """A message's number of that field number; 1 if there is none."""
    return next((value for field, value in _fields(message) if field == wanted and isinstance(value, int)), 1)


def _tensor(tensor: memoryview) -> tuple[str, list[int], int]:
    """Name, shape and bits of an element."""
    name, dims, bits = "", [], 0
    for field, value in _fields(tensor):
        if field == TENSOR_DIMS:  # repeated numbers come one by one or packed
            dims += [value] if isinstance(value, int) else list(_varints(value))
        elif field == TENSOR_DATA_TYPE:
            bits = ELEMENT_BITS.get(value, 0) if isinstance(value, int) else 0
        elif field == TENSOR_NAME:
            name = str(_as_bytes(value), "utf-8")
    return name, dims, bits


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, number or bytes) of a message, in order."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        field, wire = key >> 3, key & 7
        if wire == VARINT:
            number, at = _varint(message, at)
            yield field, number
            continue
        if wire == BYTES:
            size, at = _varint(message, at)
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(message):
            raise ValueError("truncated")
        yield field, message[at : at + size]
        at += size


def _varints(packed: memoryview) -> Iterator[int]:
    at = 0
    while at < len(packed):
        number, at = _varint(packed, at)
        yield number


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number, seven bits a byte, lowest first; and where it ends."""
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if byte < 0x80:
            return number, at


def _as_bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where bytes are expected")
    return value
