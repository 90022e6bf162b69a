"""Signals that end a program in an orderly way."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

ENDING_SIGNALS = [signal.SIGTERM, signal.SIGHUP] if hasattr(signal, "SIGHUP") else [signal.SIGTERM]


@contextlib.contextmanager
def handling_signals(handlers: Mapping[int, Any]) -> Iterator[None]:
    """Install signal handlers for the block. Changes nothing outside the main thread, to which signals belong."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def exiting_on_signals() -> Iterator[None]:
    """Raise SystemExit in the block on SIGTERM, from service managers, and on SIGHUP, from a lost connection.

    So what the block does in the end, such as saving, is done then too. A signal that is ignored (nohup) stays so.
    """
    numbers = [number for number in ENDING_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]

    def leave(number: int, _frame: FrameType | None) -> None:
        for other in numbers:  # a terminal that goes sends several: none may cut the saving short
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    with handling_signals(dict.fromkeys(numbers, leave)):
        yield
