"""GGUF files: metadata and tensors, those of all parts of a split model together."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sinkrt.errors import UsageError, problem

from sinkexport.loading.gguf_models.header import NotGgufError, read_part

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
"""Pattern of llama.cpp's names for the parts of a split model; the first holds the metadata."""


END_NAMES = ("eos", "eot", "eom")
"""Names of the ids in the metadata that end a text, a turn or a message."""


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A GGUF model.

    parts: its files, in order. metadata: key -> value (str, int, float, bool or a list of them), as in the first part.
    tensors: name -> gguf's ReaderTensor, of all parts; `data` is a view of the file, quantised as it lies there.
    """

    parts: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """``general.architecture``."""
        return str(self.metadata.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; ``{arch}`` in it stands for the architecture."""
        return self.metadata.get(key.format(arch=self.architecture), default)


def open_gguf(path: Path) -> GgufFile:
    """Read a GGUF file, or the model that `path` is a part of.

    Raises: UsageError for a file that is no GGUF or cut short, and for parts that are missing or do not fit.
    """
    parts = tuple(_parts(path))
    try:
        changed_ns = tuple(part.stat().st_mtime_ns for part in parts)
    except OSError as error:
        raise _no_gguf(path, error.strerror or str(error)) from None
    return _read(parts, changed_ns)


def model_name(path: Path) -> str:
    """The name of the model in a file: that of the file without its suffix and the number of the part."""
    match = PART.fullmatch(path.name)
    return match["stem"] if match else path.stem


@functools.lru_cache(maxsize=2)
def _read(parts: tuple[Path, ...], _changed_ns: tuple[int, ...]) -> GgufFile:
    metadata: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for number, part in enumerate(parts):
        try:
            found, here = read_part(part)
        except NotGgufError as error:
            raise _no_gguf(part, str(error)) from None
        except (OSError, ValueError) as error:
            raise _no_gguf(part, f"{type(error).__name__}: {error}") from error
        _check_split(part, found, number, len(parts))
        for name in here:
            if name in tensors:
                raise _no_gguf(part, f"tensor '{name}' for the second time")
        tensors.update(here)
        metadata = {**found, **metadata}  # the first part's go first
    count = metadata.get("split.tensors.count")
    if count is not None and count != len(tensors):
        raise _no_gguf(parts[0], f"{len(tensors)} tensors in {len(parts)} parts, where {count} are announced")
    return GgufFile(parts=parts, metadata=metadata, tensors=tensors)


def _check_split(part: Path, found: Mapping[str, Any], number: int, count: int) -> None:
    """Compare what a part says about its place with its name. number: from 0.

    Raises: UsageError.
    """
    announced, place = found.get("split.count"), found.get("split.no")
    if announced in (None, 0) and count == 1:
        return
    if announced != count:
        said = "says nothing of a split" if announced is None else f"says that it is one of {announced} parts"
        raise UsageError(
            problem(
                "model",
                received=f"'{part}', which {said}, under a name that says {count}",
                expected="names as llama.cpp gives them, NAME-00001-of-00002.gguf",
                fix="rename the parts or download them again",
            )
        )
    if place != number:
        raise UsageError(
            problem(
                "model",
                received=f"'{part}', which says that it is part {place} (from 0)",
                expected=f"part {number}",
                fix="rename the parts or download them again",
            )
        )


def _parts(path: Path) -> list[Path]:
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    parts = [
        path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}{path.suffix}") for number in range(1, count + 1)
    ]
    missing = [part.name for part in parts if not part.is_file()]
    if missing or not parts:
        listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UsageError(
            problem(
                "model",
                received=f"'{path}', without {listed or 'any part'}",
                expected=f"all {count} parts in one folder",
                fix="download the missing parts",
            )
        )
    return parts


def _no_gguf(path: Path, reason: str) -> UsageError:
    return UsageError(
        problem(
            "model",
            received=f"'{path}' ({' '.join(reason.split())[:160]})",
            expected="a whole GGUF file",
            fix="download the file again",
        )
    )
