"""Measured memory-read bandwidth: the floor under every decode step, which has to read all weights once.

    python benchmarks/bandwidth.py [--threads N] [--mib 512]
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

# Reductions that keep up with the memory: each reads its array once and writes nothing. Which of them is quickest
# depends on the processor, so the best one counts; a reduction that computes too much would flatter the ratio.
READERS: dict[str, Callable[[Any], Any]] = {
    "max float32": lambda part: part.max(),
    "or uint64": lambda part: np.bitwise_or.reduce(part.view(np.uint64)),
    "sum float32": lambda part: part.sum(),
}
MIN_BYTES = 512 * 2**20  # beyond any last-level cache


class ReadProbe:
    """A buffer of `num_bytes` and `threads` threads to read it; NumPy releases the interpreter lock in reductions."""

    def __init__(self, threads: int, num_bytes: int = MIN_BYTES) -> None:
        self._buffer = np.ones(num_bytes // 8 * 2, np.float32)  # an even count: also viewed as uint64
        pairs = self._buffer.size // 2
        edges = [2 * (pairs * i // threads) for i in range(threads + 1)]
        self._parts = [self._buffer[a:b] for a, b in itertools.pairwise(edges)]
        self._pool = ThreadPoolExecutor(threads)

    def gb_per_s(self, repeats: int = 7) -> float:
        """GB/s (1e9 bytes): the median over `repeats` reads of the quickest reader."""
        best = 0.0
        for read in READERS.values():
            self._seconds(read)  # warm-up: pages, threads, clock
            best = max(best, self._buffer.nbytes / statistics.median(self._seconds(read) for _ in range(repeats)) / 1e9)
        return best

    def _seconds(self, read: Callable[[Any], Any]) -> float:
        start = time.perf_counter()
        list(self._pool.map(read, self._parts))
        return time.perf_counter() - start


def main() -> None:
    """Print one thread's and all threads' bandwidth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--mib", type=int, default=MIN_BYTES >> 20, help="buffer size; should exceed the caches by far")
    arguments = parser.parse_args()
    for threads in sorted({1, arguments.threads}):
        print(f"{threads} thread(s): {ReadProbe(threads, arguments.mib << 20).gb_per_s():.1f} GB/s")


if __name__ == "__main__":
    main()
