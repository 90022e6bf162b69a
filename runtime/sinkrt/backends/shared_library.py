"""Shared libraries that come as files: looked at before the loader maps them.

The loader maps segments beyond the end of a file that was cut short, and the first look at one ends the process.
Twin of runtime/cpp/src/backends/shared_library.cpp.
"""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

_HEADER_BYTES = 64  # of ELF with 64-bit addresses
_LOADED = 1  # kind of a segment that is mapped


def open_library(path: Path, mode: int = ctypes.DEFAULT_MODE) -> ctypes.CDLL:
    """Open a library.

    Raises: OSError if it was cut short, or the loader refuses it.
    """
    resolved = path.resolve()
    if (missing := _missing_bytes(resolved)) > 0:
        raise OSError(f"the file was cut short: at least {missing} bytes are missing")
    return ctypes.CDLL(str(resolved), mode=mode)


def text_of(library: ctypes.CDLL, function: str) -> str | None:
    """The text that a function without arguments returns; None: it returns NULL.

    Raises: AttributeError if the library has no such function.
    """
    called = getattr(library, function)
    called.restype = ctypes.c_char_p
    text: bytes | None = called()
    return None if text is None else text.decode("utf-8", "backslashreplace")


def _missing_bytes(path: Path) -> int:
    """Bytes from the end of a file to the end of what its headers list.

    0 or less: it is whole, or not of a kind that is known here (ELF, 64 bits, little-endian): that is for the loader.
    """
    try:
        with path.open("rb") as file:
            size, head = path.stat().st_size, file.read(_HEADER_BYTES)
            if len(head) < _HEADER_BYTES or head[:6] != b"\x7fELF\x02\x01":
                return 0
            segments_at, sections_at = struct.unpack_from("<QQ", head, 32)
            segment_bytes, num_segments, section_bytes, num_sections = struct.unpack_from("<4H", head, 54)
            end = max(segments_at + segment_bytes * num_segments, sections_at + section_bytes * num_sections)
            file.seek(segments_at)
            table = file.read(segment_bytes * num_segments)
    except OSError:
        return 0
    for at in range(0, len(table) - 39, segment_bytes):
        kind, _flags, offset, _address, _physical, num_bytes = struct.unpack_from("<IIQQQQ", table, at)
        if kind == _LOADED:
            end = max(end, offset + num_bytes)
    return int(end - size)
