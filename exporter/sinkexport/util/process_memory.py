"""Resident memory of this process."""

from __future__ import annotations

import os
from pathlib import Path

MIB = 2**20


def resident_bytes() -> int:
    """Read the resident memory of this process, bytes; 0 where the system does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
