"""Text files that commands read, and result files: checked before long work starts, written whole or not at all."""

from __future__ import annotations

import codecs
import os
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from sinkrt.errors import UsageError, problem
from sinkrt.files import check_replaceable, is_special, replacing

if TYPE_CHECKING:
    import pydantic

PIECE_BYTES = 2**20


def read_text(path: Path, option: str, max_bytes: int | None = None) -> str:
    """Read the UTF-8 text of a file that `option` named, or its first `max_bytes` bytes.

    Raises: UsageError.
    """
    try:
        with path.open("rb") as file:
            raw = file.read() if max_bytes is None else _read_at_most(file, max_bytes)
        is_cut = max_bytes is not None and len(raw) == max_bytes  # perhaps inside a character
        text, _ = codecs.utf_8_decode(raw, "strict", not is_cut)
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        reason = f"'{path}' ({error.strerror})"
        raise UsageError(problem(option, received=reason, expected="a readable file", fix="check the path")) from None
    except UnicodeDecodeError as error:
        reason = f"'{path}' ({error.reason} at byte {error.start})"
        raise UsageError(problem(option, received=reason, expected="UTF-8 text", fix="convert the file")) from None


def _read_at_most(file: BinaryIO, max_bytes: int) -> bytes:
    """Read in pieces: one `read` would allocate all of `max_bytes` for the shortest file."""
    raw = bytearray()
    while piece := file.read(min(PIECE_BYTES, max_bytes - len(raw))):
        raw += piece
    return bytes(raw)


def first_problem(error: pydantic.ValidationError) -> str:
    """Describe the first thing that is wrong with a JSON file, behind its key."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])


def check_writable(path: Path, option: str) -> None:
    """Check, by trying, that `path` can be written later; what is there stays as it is.

    option: that named it, for the message.

    Raises: UsageError.
    """
    try:
        if not is_special(path):
            check_replaceable(path)
        elif not os.access(path, os.W_OK):  # /dev/stdout, a pipe
            raise PermissionError(None, "no permission")
    except OSError as error:
        raise _unwritable(path, option, error) from None


def write_whole(path: Path, data: str | bytes, option: str) -> None:
    """Write `data` under a temporary name and rename it, so that a crash leaves the file that was there.

    Raises: UsageError.
    """
    raw = data.encode() if isinstance(data, str) else data
    try:
        if is_special(path):  # nothing that could be replaced by a rename
            path.write_bytes(raw)
            return
        with replacing(path) as file:
            file.write(raw)
    except OSError as error:
        raise _unwritable(path, option, error) from None


def _unwritable(path: Path, option: str, error: OSError) -> UsageError:
    return UsageError(
        problem(
            option,
            received=f"'{path}' ({error.strerror or error})",
            expected="a file that can be written",
            fix="choose another path",
        )
    )
