"""Resident memory of this process."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

MIB = 2**20


def resident_bytes() -> int:
    """Read the resident memory of this process, bytes; 0 where the system does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def release_pages(mapped: Any) -> None:
    """Let go of the pages of a mapped file, which count as this process's memory. Later reads fetch them again.

    mapped: the mapping, or an array that is a view of it; nothing happens with another array.
    """
    while isinstance(mapped, np.ndarray | memoryview):
        mapped = mapped.base if isinstance(mapped, np.ndarray) else mapped.obj
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
