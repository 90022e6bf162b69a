"""Read safetensors files: eight bytes of length, a header in JSON, then the numbers. Nothing is shared with the
libraries that a model is loaded with, so that what was loaded can be compared with what lies in the file.

Source: the format's description in the safetensors repository (``README.md``, "Format").
"""

from __future__ import annotations

import functools
import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from sinkrt.errors import UsageError, problem

from sinkexport.loading.checkpoints.file_tensor import FileTensor

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""safetensors' own limit."""

LFS_MARK = b"version https://git-lfs"
ELEMENTS: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "BOOL": np.bool_,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
}


def read_safetensors(path: Path) -> dict[str, FileTensor]:
    """The tensors of a file by name; their numbers are read when they are asked for.

    Raises: UsageError for a file that is cut short, empty, a Git LFS pointer or otherwise no safetensors file.
    """
    header, data_start, size = _header(path)
    tensors = {}
    spans = []
    for name, facts in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = str(facts["dtype"]), tuple(int(n) for n in facts["shape"])
            start, end = (int(n) for n in facts["data_offsets"])
        except (TypeError, KeyError, ValueError) as error:
            raise unreadable(path, f"a header without type, shape or place of '{name}'") from error
        element = ELEMENTS.get(dtype)
        if element is None:
            raise unreadable(path, f"numbers of type {dtype} in '{name}'")
        if min(shape, default=0) < 0 or end - start != np.dtype(element).itemsize * int(np.prod(shape, dtype=object)):
            raise unreadable(path, f"'{name}' of shape {list(shape)} in {end - start} bytes")
        spans.append((start, end, name))
        array = functools.partial(_numbers, path, data_start + start, data_start + end, element, shape)
        tensors[name] = FileTensor(name=name, shape=shape, dtype=dtype, file=path.name, array=array)
    _check_spans(path, spans, size - data_start)
    return tensors


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the numbers start, and the file's size, in bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(LENGTH_BYTES)
        if not start:
            raise unreadable(path, "an empty file")
        if (start + file.read(len(LFS_MARK))).startswith(LFS_MARK):
            raise lfs_pointer(path)
        length = int.from_bytes(start, "little")
        if len(start) < LENGTH_BYTES or length > min(size - LENGTH_BYTES, MAX_HEADER_BYTES):
            raise unreadable(path, f"{size} bytes, with a header of {length}")
        file.seek(LENGTH_BYTES)
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=functools.partial(_without_duplicates, path))
    except (ValueError, RecursionError) as error:
        raise unreadable(path, "a header that is no JSON") from error
    if not isinstance(header, dict):
        raise unreadable(path, "a header that is no table")
    return header, LENGTH_BYTES + length, size


def _without_duplicates(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise unreadable(path, f"'{twice}' for the second time")
    return table


def _check_spans(path: Path, spans: list[tuple[int, int, str]], num_bytes: int) -> None:
    """The tensors must fill the rest of the file, without holes and without sharing bytes."""
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise unreadable(path, f"'{name}' at byte {start}, where {end} was expected")
        end = stop
    if end != num_bytes:
        raise unreadable(path, f"{num_bytes} bytes of numbers, where the header says {end}: cut short?")


def _numbers(path: Path, start: int, end: int, element: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A view of the file."""
    if start == end:
        return np.zeros(shape, element)
    whole = _mapped(path, path.stat().st_mtime_ns)
    return np.frombuffer(whole, np.uint8, end - start, start).view(element).reshape(shape)


@functools.lru_cache(maxsize=64)
def _mapped(path: Path, _changed_ns: int) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def lfs_pointer(path: Path) -> UsageError:
    """Refusal of a pointer in a folder that was cloned without Git LFS."""
    return UsageError(
        problem(
            f"'{path.name}'",
            received="a Git LFS pointer, a text of 130 bytes",
            expected="the file itself",
            fix="run 'git lfs pull' in the folder, or download it again",
        )
    )


def unreadable(path: Path, reason: str) -> UsageError:
    """A weight file that is damaged."""
    return UsageError(
        problem(
            f"weights '{path.name}'",
            received=reason,
            expected="a whole safetensors file",
            fix="download or save it again",
        )
    )
