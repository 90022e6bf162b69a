"""Tensors of an ONNX graph whose data lies in another file: where each is.

A reader of the few fields of the format that say so, since the runtime needs no onnx package. Twin of
runtime/cpp/src/backends/external_tensors.cpp. Source: onnx.proto3 (ModelProto, GraphProto, TensorProto) and the
encoding of Protocol Buffers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_GRAPH = 7  # of ModelProto
_INITIALIZER = 5  # of GraphProto
_DIMS, _DATA_TYPE, _NAME, _EXTERNAL_DATA = 1, 2, 8, 13  # of TensorProto
_KEY, _VALUE = 1, 2  # of StringStringEntryProto
_MOST_VARINT_BYTES = 10


@dataclasses.dataclass(frozen=True, slots=True)
class ExternalTensor:
    """An initializer of the graph: its place in a file that lies beside the graph's.

    data_type: of onnx.TensorProto.DataType. num_bytes: None: the graph does not say.
    """

    name: str
    data_type: int
    shape: tuple[int, ...]
    file: str
    offset: int
    num_bytes: int | None


def external_tensors(model: bytes) -> list[ExternalTensor]:
    """Initializers of the main graph with external data, in the graph's order. model: the content of an ONNX file.

    Raises: ValueError for what is no ONNX file.
    """
    data = memoryview(model)
    return [
        tensor
        for graph in _submessages(data, _GRAPH)
        for initializer in _submessages(graph, _INITIALIZER)
        if (tensor := _external_tensor(initializer)) is not None
    ]


def _external_tensor(message: memoryview) -> ExternalTensor | None:
    name, data_type = "", 0
    shape: list[int] = []
    entries: dict[str, str] = {}
    for field, value in _fields(message):
        if field == _DIMS:
            shape += [value] if isinstance(value, int) else _varints(value)
        elif field == _DATA_TYPE and isinstance(value, int):
            data_type = value
        elif field == _NAME and not isinstance(value, int):
            name = _text(value)
        elif field == _EXTERNAL_DATA and not isinstance(value, int):
            parts = {key: _text(part) for key, part in _fields(value) if not isinstance(part, int)}
            entries[parts.get(_KEY, "")] = parts.get(_VALUE, "")
    if "location" not in entries:
        return None
    length = entries.get("length")
    num_bytes = None if length is None else int(length)
    return ExternalTensor(
        name, data_type, tuple(shape), entries["location"], int(entries.get("offset", "0")), num_bytes
    )


def _submessages(message: memoryview, wanted: int) -> Iterator[memoryview]:
    for field, value in _fields(message):
        if field == wanted and not isinstance(value, int):
            yield value


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field numbers and values: integers, or the bytes of strings, messages, lists and numbers of fixed size.

    Raises: ValueError if the message is cut short or has a field of another kind.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(message, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if size > len(message) - at:
            raise ValueError("a field that is cut short")
        yield key >> 3, message[at : at + size]
        at += size


def _varints(data: memoryview) -> list[int]:
    out, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        out.append(value)
    return out


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    value = 0
    for i, byte in enumerate(data[at : at + _MOST_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise ValueError("a number that does not end")


def _text(data: memoryview) -> str:
    return bytes(data).decode()
