"""GGUF metadata for tests: a reader that shares nothing with the exporter's, and files without tensors."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

DEFAULT = Path(__file__).parents[2] / "models" / "llama-vocabs"
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9


def llama_vocab(name: str) -> Path:
    """One of llama.cpp's test vocabularies: in SINKEXPORT_LLAMA_VOCABS, or where `make test` puts them."""
    path = Path(os.environ.get("SINKEXPORT_LLAMA_VOCABS", DEFAULT)) / f"ggml-vocab-{name}.gguf"
    if not path.is_file():
        message = f"no file at '{path}': run 'make test', or set SINKEXPORT_LLAMA_VOCABS"
        if os.environ.get("SINKEXPORT_NO_SKIP"):
            pytest.fail(message)
        pytest.skip(message)
    return path


def read_metadata(path: Path) -> dict[str, Any]:
    """All keys and values."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        assert data[:4] == b"GGUF"
        (count,) = struct.unpack_from("<Q", data, 16)
        at, out = 24, {}
        for _ in range(count):
            key, at = _text(data, at)
            (kind,) = struct.unpack_from("<I", data, at)
            out[key], at = _value(data, kind, at + 4)
    return out


def _text(data: mmap.mmap, at: int) -> tuple[str, int]:
    size = int.from_bytes(data[at : at + 8], "little")
    return data[at + 8 : at + 8 + size].decode(), at + 8 + size


def _value(data: mmap.mmap, kind: int, at: int) -> tuple[Any, int]:
    if kind == TEXT:
        return _text(data, at)
    if kind != ARRAY:
        return struct.unpack_from("<" + FORMATS[kind], data, at)[0], at + struct.calcsize(FORMATS[kind])
    inner, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if inner == TEXT:
        items = []
        for _ in range(count):
            item, at = _text(data, at)
            items.append(item)
        return items, at
    layout = f"<{count}{FORMATS[inner]}"
    return list(struct.unpack_from(layout, data, at)), at + struct.calcsize(layout)


def write_metadata(path: Path, metadata: Mapping[str, Any]) -> Path:
    """A GGUF file of these keys and no tensors; the architecture is llama. Integers become uint32, scores float32."""
    everything = {"general.architecture": "llama", **metadata}
    parts = [b"GGUF", struct.pack("<IQQ", 3, 0, len(everything))]
    for key, value in everything.items():
        kind, packed = _packed(key, value)
        parts += [_packed_text(key), struct.pack("<I", kind), packed]
    path.write_bytes(b"".join(parts))
    return path


def _packed_text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _packed(key: str, value: Any) -> tuple[int, bytes]:
    if isinstance(value, str):
        return TEXT, _packed_text(value)
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value[0], str):
        return ARRAY, struct.pack("<IQ", TEXT, len(value)) + b"".join(map(_packed_text, value))
    kind = 6 if isinstance(value[0], float) else 5
    return ARRAY, struct.pack(f"<IQ{len(value)}{FORMATS[kind]}", kind, len(value), *value)
