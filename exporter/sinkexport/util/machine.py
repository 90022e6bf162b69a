"""What a machine has."""

from __future__ import annotations

import os


def total_memory_bytes() -> int:
    """Memory of this machine, used or free."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
