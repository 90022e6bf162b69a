"""Read the header of one GGUF file: its metadata and where its tensors lie.

gguf-py has a reader too, which loops over the lengths of a damaged file for hours. This one checks every length against
the size of the file before it follows it, and reads a vocabulary of 49,152 tokens in a fifth of the time. Block sizes,
type numbers and dequantisation are gguf-py's.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class NotGgufError(Exception):
    """Bytes that are not a whole GGUF file, with the reason."""


def read_part(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors of one file.

    Returns: key -> value, and name -> gguf's ReaderTensor, whose data are a view of the file mapped into memory:
    uint8 [rows.., bytes of a row] for quantised types.
    Raises: NotGgufError, OSError.
    """
    if not path.is_file():
        raise NotGgufError("not a regular file")
    if path.stat().st_size < 24:
        raise NotGgufError("shorter than a header")
    cursor = _Cursor(np.memmap(path, dtype=np.uint8, mode="r"))
    if bytes(cursor.data[:4]) != MAGIC:
        raise NotGgufError(_other_format(bytes(cursor.data[:64])))
    cursor.place = 4
    version = cursor.scalar("I")
    if version not in VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
            raise NotGgufError("big-endian; only little-endian files are read: convert it with gguf_convert_endian.py")
        raise NotGgufError(f"version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} are read")
    num_tensors, num_keys = cursor.scalar("Q"), cursor.scalar("Q")
    cursor.expect_room(num_keys, 13, "metadata keys")
    cursor.expect_room(num_tensors, 32, "tensors")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.text()
        if key in metadata:
            raise NotGgufError(f"key '{key}' for the second time")
        metadata[key] = cursor.value(cursor.scalar("I"), key)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise NotGgufError(f"general.alignment {alignment!r}, which is no power of two")
    infos = [_tensor_info(cursor) for _ in range(num_tensors)]
    start = math.ceil(cursor.place / alignment) * alignment
    tensors: dict[str, Any] = {}
    for name, shape, kind, offset in infos:
        if name in tensors:
            raise NotGgufError(f"tensor '{name}' for the second time")
        tensors[name] = _tensor(cursor.data, name, shape, kind, start + offset)
    return metadata, tensors


def _tensor_info(cursor: _Cursor) -> tuple[str, list[int], int, int]:
    """Name, shape (ggml's order: the row's length first), type number, offset from the start of the data."""
    name = cursor.text()
    dimensions = cursor.scalar("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise NotGgufError(f"tensor '{name}' with {dimensions} dimensions")
    shape = [cursor.scalar("Q") for _ in range(dimensions)]
    return name, shape, cursor.scalar("I"), cursor.scalar("Q")


def _tensor(data: Any, name: str, shape: list[int], kind: int, place: int) -> Any:
    """gguf's ReaderTensor for `shape` at byte `place` of the file."""
    import gguf

    try:
        quantisation = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
    except (ValueError, KeyError):
        raise NotGgufError(f"tensor '{name}' of the unknown type {kind}") from None
    elements = math.prod(shape)
    if elements == 0 or shape[0] % block:
        raise NotGgufError(f"tensor '{name}' of shape {shape}, which {quantisation.name} cannot hold")
    num_bytes = elements // block * block_bytes
    if place + num_bytes > len(data):
        raise NotGgufError(f"cut short: tensor '{name}' ends at byte {place + num_bytes} of {len(data)}")
    raw = data[place : place + num_bytes]
    plain = {
        "F16": np.float16,
        "F32": np.float32,
        "F64": np.float64,
        "I8": np.int8,
        "I16": np.int16,
        "I32": np.int32,
        "I64": np.int64,
    }
    rows = shape[:0:-1]
    if quantisation.name in plain:
        array = raw.view(plain[quantisation.name]).reshape(*rows, shape[0])
    else:
        array = raw.reshape(*rows, shape[0] // block * block_bytes)
    return gguf.gguf_reader.ReaderTensor(
        name, quantisation, np.array(shape, dtype=np.uint64), elements, num_bytes, place, array, None
    )


def _other_format(start: bytes) -> str:
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself"
    if start[:4] in (b"ggml", b"ggjt", b"lmgg", b"tjgg", b"fmgg"):
        return "an older GGML format: convert it with llama.cpp"
    return "does not begin with 'GGUF'"


class _Cursor:
    """Reads values one after another. place: byte in the file."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self._bytes = memoryview(data)
        self.place = 0

    def expect_room(self, count: int, each_bytes: int, what: str) -> None:
        if count * each_bytes > len(self._bytes) - self.place:
            raise NotGgufError(f"cut short: {count} {what} announced, {len(self._bytes) - self.place} bytes left")

    def scalar(self, code: str) -> Any:
        form = f"<{code}"
        try:
            (value,) = struct.unpack_from(form, self._bytes, self.place)
        except struct.error:
            raise NotGgufError(f"cut short: the header ends at byte {len(self._bytes)}") from None
        self.place += struct.calcsize(form)
        return value

    def text(self) -> str:
        length = self.scalar("Q")
        self.expect_room(length, 1, "bytes of a text")
        begin, self.place = self.place, self.place + length
        try:
            return str(self._bytes[begin : self.place], "utf-8")
        except UnicodeDecodeError:
            raise NotGgufError(f"a text at byte {begin} that is not UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        """A value of type number `kind`; arrays as lists."""
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise NotGgufError(f"key '{key}' of the unknown type {kind}")
        of, count = self.scalar("I"), self.scalar("Q")
        if of == _STRING:
            self.expect_room(count, 8, f"texts in '{key}'")
            return [self.text() for _ in range(count)]
        if of not in _SCALARS:
            raise NotGgufError(f"key '{key}' with an array of type {of}")
        code = _SCALARS[of]
        self.expect_room(count, struct.calcsize(f"<{code}"), f"values in '{key}'")
        begin = self.place
        self.place += count * struct.calcsize(f"<{code}")
        return np.frombuffer(self._bytes[begin : self.place], dtype=np.dtype(f"<{code}")).tolist()
