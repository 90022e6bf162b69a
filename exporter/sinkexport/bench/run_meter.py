"""Speed and memory of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from sinkexport.util.process_memory import MIB, resident_bytes

if TYPE_CHECKING:
    from sinkrt import Session


class RunMeter:
    """Measures speed and memory of a run. Its own memory is constant: it keeps the last `kept` latencies."""

    def __init__(self, session: Session, kept: int = 100_000) -> None:
        self._session = session
        self._latencies_ms = np.zeros(kept)
        self._latencies_ms.fill(0)  # touches its memory, which would count as growth later
        self._count = 0
        self._rss_at_start = resident_bytes()

    def timed(self, pieces: Iterator[str]) -> Iterator[str]:
        """Pass pieces on. A latency is the time from one piece to the next, over the tokens in between."""
        before, position = time.perf_counter(), self._position()
        for piece in pieces:
            now, reached = time.perf_counter(), self._position()
            for _ in range(reached - position):
                self._latencies_ms[self._count % self._latencies_ms.size] = (now - before) * 1e3 / (reached - position)
                self._count += 1
            yield piece
            before, position = time.perf_counter(), reached

    @property
    def latencies_ms(self) -> np.ndarray:
        """Latencies [n] that are kept, in no order."""
        return self._latencies_ms[: self._count]

    def report(self) -> str:
        """Report speed, position and memory in one line."""
        stream = self._session.manifest.stream
        position = self._position()
        wraps = f"{max(0, position - stream.num_sink_tokens) / stream.window_size:.1f} windows of {stream.window_size}"
        if not self._session.manifest.caches:
            wraps = "no attention"
        kept = self.latencies_ms
        speed = (
            f"{self._count} tokens, {np.median(kept):.1f} ms/token median, {np.percentile(kept, 99):.1f} ms p99"
            if self._count
            else "no tokens"
        )
        rss = resident_bytes()
        memory = (
            f"memory {rss / MIB:.0f} MiB ({(rss - self._rss_at_start) / MIB:+.1f} MiB since the start), " if rss else ""
        )
        return (
            f"{speed}; position {position}, {wraps}; {memory}state {self._session.manifest.state_bytes / MIB:.1f} MiB"
        )

    def _position(self) -> int:
        return int(self._session.position[0])
