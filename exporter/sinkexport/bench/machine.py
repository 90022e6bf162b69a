"""The machine that a measurement ran on: its cores, and how fast they read memory.

Reading memory bounds every decode step from below: it reads all weights once.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sinkexport.util.machine import total_memory_bytes
from sinkexport.util.process_memory import resident_bytes

PACKAGES = ("sinkexport", "onnxruntime", "numpy")
# Reductions that keep up with the memory: each reads its array once and writes nothing. Which of them is quickest
# depends on the processor, so the best one counts. A reduction that computes too much would flatter the ratio.
READERS: dict[str, Callable[[Any], Any]] = {
    "max float32": lambda part: part.max(),
    "or uint64": lambda part: np.bitwise_or.reduce(part.view(np.uint64)),
    "sum float32": lambda part: part.sum(),
}
PROBE_BYTES = 512 * 2**20
"""Size of the probe's buffer: beyond any last-level cache."""


class ReadProbe:
    """A buffer of `num_bytes` and `threads` threads to read it; NumPy releases the interpreter lock in reductions."""

    def __init__(self, threads: int, num_bytes: int = PROBE_BYTES) -> None:
        self._buffer = np.ones(num_bytes // 8 * 2, np.float32)  # an even count: also viewed as uint64
        pairs = self._buffer.size // 2
        edges = [2 * (pairs * i // threads) for i in range(threads + 1)]
        self._parts = [self._buffer[a:b] for a, b in itertools.pairwise(edges)]
        self._pool = ThreadPoolExecutor(threads)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the probe itself holds."""
        return self._buffer.nbytes

    def gb_per_s(self, repeats: int = 7) -> float:
        """Measure the bandwidth, GB/s (1e9 bytes): the median over `repeats` reads of the quickest reader."""
        best = 0.0
        for read in READERS.values():
            self._seconds(read)  # warm-up: pages, threads, clock
            best = max(best, self._buffer.nbytes / statistics.median(self._seconds(read) for _ in range(repeats)) / 1e9)
        return best

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _seconds(self, read: Callable[[Any], Any]) -> float:
        start = time.perf_counter()
        list(self._pool.map(read, self._parts))
        return time.perf_counter() - start


def physical_cores() -> int:
    """Count the cores that this process may run on; two hardware threads of one core count once."""
    try:
        cpus = os.sched_getaffinity(0)
        siblings = {
            Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
            for cpu in cpus
        }
    except (AttributeError, OSError):  # not Linux, or a sandbox that hides its processors
        return os.cpu_count() or 1
    return len(siblings)


def environment(threads: int, packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """Describe machine and versions, without which a number says nothing."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "logical_cpus": os.cpu_count(),
        "memory_gb": round(total_memory_bytes() / 1e9, 1),
        "load_average_1min": os.getloadavg()[0],  # other work on the machine spoils every figure
        "threads": threads,
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in packages if (version := _version(name))},
    }


class MemoryMeter:
    """Resident memory of this process, less what the measurement itself holds, from `start` on."""

    def __init__(self, held_bytes: int = 0) -> None:
        self.start_bytes = self.latest_bytes = self.highest_bytes = resident_bytes() - held_bytes
        self.known = resident_bytes() > 0

    def sample(self, held_bytes: int = 0) -> None:
        """Measure again. held_bytes: what the measurement holds now."""
        self.latest_bytes = resident_bytes() - held_bytes
        self.highest_bytes = max(self.highest_bytes, self.latest_bytes)


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n"):
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch's operators use `count` threads inside the block; None changes nothing."""
    if count is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
