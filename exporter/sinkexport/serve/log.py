"""A bound on the server's log: whatever clients do, it takes few lines a minute."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

LINES_A_MINUTE = 5
"""Lines of one kind that pass in a minute."""
MAX_KINDS = 50
PERIOD_S = 60.0
CLIENT_LEFT = "socket.send() raised exception."
"""asyncio's warning when an answer is written to a client that has gone: that is nobody's fault."""
LOGGERS = ("asyncio", "uvicorn.error", "uvicorn.access", "sinkexport.serve")


class FloodFilter(logging.Filter):
    """Lets `LINES_A_MINUTE` lines of a kind pass; the next one that passes says how many were left out.

    A kind is a logger, a level and a message before its arguments are put in. `--log-requests` logs requests that were
    answered well: these all pass. clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._lock = threading.Lock()
        self._kinds: dict[tuple[str, int, str], tuple[float, int]] = {}  # begin of its minute, lines in it

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write the line."""
        if record.name == "uvicorn.access" and _status(record) < 400:
            return True
        if record.name == "asyncio" and record.msg == CLIENT_LEFT:
            return False
        kind = (record.name, record.levelno, str(record.msg).split("\n", 1)[0][:100])
        now = self._clock()
        with self._lock:
            if kind not in self._kinds and len(self._kinds) >= MAX_KINDS:
                kind = ("others", 0, "")
            begin, lines = self._kinds.get(kind, (now, 0))
            if now - begin >= PERIOD_S:
                left_out, begin, lines = max(0, lines - LINES_A_MINUTE), now, 0
                if left_out:
                    record.msg, record.args = f"{record.getMessage()} (and {left_out} more like it before)", ()
            self._kinds[kind] = (begin, lines + 1)
            return lines < LINES_A_MINUTE


@contextlib.contextmanager
def bounded_log() -> Iterator[None]:
    """Filter all that a server logs; take the filter away in the end."""
    flood = FloodFilter()
    for name in LOGGERS:
        logging.getLogger(name).addFilter(flood)
    try:
        yield
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeFilter(flood)


def _status(record: logging.LogRecord) -> int:
    """HTTP status in a line of uvicorn's access log: its last argument."""
    last = record.args[-1] if isinstance(record.args, tuple) and record.args else 0
    return last if isinstance(last, int) else 0
