"""Memory for the states of a session: one piece, in huge pages where the system has them.

Twin of runtime/cpp/src/backends/memory.cpp.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import numpy as np

from sinkrt.contract import TensorSpec

ALIGNMENT_BYTES = 64
"""A cache line, and the alignment that vector kernels like best."""

HUGE_PAGE_BYTES = 1 << 21
"""Size of a huge page of x86-64, and of ARM with small pages of 4 KiB."""


def states_in_one_piece(specs: Sequence[TensorSpec]) -> list[np.ndarray]:
    """Arrays of zeros, one after the other, each at a multiple of ALIGNMENT_BYTES.

    A step reads all of them. In pages of 4 KiB it would miss the translation of addresses most of the time.

    Raises: MemoryError.
    """
    starts, end = [], 0
    for spec in specs:
        starts.append(end)
        end += -(-spec.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    memory = _zeros(max(end, 1))
    return [
        memory[start : start + spec.nbytes].view(spec.dtype).reshape(spec.shape)
        for start, spec in zip(starts, specs, strict=True)
    ]


def _zeros(num_bytes: int) -> np.ndarray:
    """Memory of this process alone, uint8 [num_bytes], freed with the last array that refers to it.

    Whole huge pages only, so that no more memory is taken than asked for; the rest lies in small ones.
    """
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        try:
            # Private: what a child process writes after a fork is its own.
            pages = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise MemoryError(f"no room for {num_bytes} bytes of states") from error
        raw = np.frombuffer(pages, np.uint8)
        start = -raw.ctypes.data % HUGE_PAGE_BYTES
        if huge_bytes := num_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES:
            with contextlib.suppress(OSError):  # a kernel without them
                pages.madvise(mmap.MADV_HUGEPAGE, start, huge_bytes)
    else:
        raw = np.empty(num_bytes + ALIGNMENT_BYTES, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT_BYTES
    out: np.ndarray = raw[start : start + num_bytes]
    out.fill(0)  # touches every page now, rather than in the first steps
    return out
