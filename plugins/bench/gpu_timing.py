"""What the benchmarks here share: time of launches in a CUDA graph, and what the memory can do. Needs a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

REPLAYS, WARM_UP = 60, 10
COPY_BYTES = 1 << 30


def times_us(run: Callable[[], Any], launches: int) -> list[float]:
    """One figure a replay of a graph of `launches`: microseconds a launch."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(WARM_UP):
        graph.replay()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPLAYS)]
    for start, end in marks:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) * 1000 / launches for start, end in marks)


def copy_bandwidth() -> float:
    """Bytes read + written in a second by a device-to-device copy: the faster of the driver's and of a kernel."""
    source = torch.randint(-(2**62), 2**62, (COPY_BYTES // 8,), device="cuda")
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target))
    best_us = min(statistics.median(times_us(way, 1)) for way in ways)
    return 2 * COPY_BYTES / (best_us * 1e-6)
