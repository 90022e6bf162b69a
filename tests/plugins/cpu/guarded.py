"""Memory for a call of a kernel: what is read or written beyond an array's end ends the process at once."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

LIBC = ctypes.CDLL(None, use_errno=True)
PROT_NONE = 0
PATTERN = 0xA5


class Guarded:
    """A copy of an array that ends where a page without access begins; the bytes before it hold a pattern.

    alignment: of the array's address; what does not fit exactly leaves up to that many bytes behind the end.
    """

    def __init__(self, array: np.ndarray, alignment: int = 4) -> None:
        array = np.ascontiguousarray(array)
        page = mmap.PAGESIZE
        size = -(-array.nbytes // page) * page + page  # at least one byte before the array
        self._map = mmap.mmap(-1, size + page)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        if LIBC.mprotect(ctypes.c_void_p(begin + size), ctypes.c_size_t(page), PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
        self._offset = (size - array.nbytes) // alignment * alignment
        self._bytes = np.frombuffer(self._map, dtype=np.uint8, count=size)
        self._bytes[:] = PATTERN
        self._end = self._offset + array.nbytes
        self.array = self._bytes[self._offset : self._end].view(array.dtype).reshape(array.shape)
        self.array[...] = array
        self.address = begin + self._offset

    def is_intact(self) -> bool:
        """Whether the bytes around the array are as they were."""
        around = (self._bytes[: self._offset], self._bytes[self._end :])
        return all(bool((part == PATTERN).all()) for part in around)
