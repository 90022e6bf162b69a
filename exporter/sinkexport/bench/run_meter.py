"""Text streams of any length in constant memory, and the meter of a run."""

from __future__ import annotations

import codecs
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import numpy as np

if TYPE_CHECKING:
    from sinkrt import Session

MIB = 2**20
READ_BYTES = 4096


class RawReader(Protocol):
    """What has a `read` that returns as soon as there is anything."""

    def read(self, size: int, /) -> bytes | None: ...


def utf8_lines(source: RawReader) -> Iterator[list[str]]:
    """Lines of a byte stream, those of one read together, line breaks included; what is no UTF-8 becomes U+FFFD.

    A line longer than `READ_BYTES` characters comes in parts, cut before a space if it has one, never inside a
    character. So memory stays constant even if no line break ever comes.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = ""
    while block := source.read(READ_BYTES):
        text += decoder.decode(block)
        *lines, text = text.split("\n")
        parts = [line + "\n" for line in lines]
        while len(text) > READ_BYTES:
            cut = text.rfind(" ", 1, READ_BYTES)
            cut = READ_BYTES if cut < 0 else cut
            parts.append(text[:cut])
            text = text[cut:]
        if parts:
            yield parts
    if text := text + decoder.decode(b"", final=True):
        yield [text]


def complete_lines(source: BinaryIO) -> Iterator[str]:
    """Whole lines of a buffered byte stream without their line breaks; bytes that are no UTF-8 become U+FFFD."""
    while line := source.readline():
        yield line.decode("utf-8", errors="replace").rstrip("\r\n")


class RunMeter:
    """Speed and memory of a run, in constant memory itself: it keeps the last `KEPT` latencies."""

    KEPT = 100_000

    def __init__(self, session: Session) -> None:
        self._session = session
        self._latencies_ms = np.zeros(self.KEPT)
        self._latencies_ms.fill(0)  # touches its memory, which would count as growth later
        self._count = 0
        self._rss_at_start = resident_bytes()

    def timed(self, pieces: Iterator[str]) -> Iterator[str]:
        """Pass pieces on; the time from one to the next, shared among the tokens in between, is a latency."""
        before, position = time.perf_counter(), self._position()
        for piece in pieces:
            now, reached = time.perf_counter(), self._position()
            for _ in range(reached - position):
                self._latencies_ms[self._count % self.KEPT] = (now - before) * 1e3 / (reached - position)
                self._count += 1
            yield piece
            before, position = time.perf_counter(), reached

    def report(self) -> str:
        """One line."""
        stream = self._session.manifest.stream
        position = self._position()
        wraps = max(0, position - stream.num_sink_tokens) / stream.window_size
        kept = self._latencies_ms[: min(self._count, self.KEPT)]
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
            f"{speed}; position {position}, {wraps:.1f} windows of {stream.window_size}; "
            f"{memory}state {self._session.manifest.state_bytes / MIB:.1f} MiB"
        )

    def _position(self) -> int:
        return int(self._session.position[0])


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
