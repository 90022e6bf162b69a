"""From the engine's thread to the event loop: what an answer says, with a bound on what nobody has taken yet."""

from __future__ import annotations

import asyncio
import dataclasses
import time

from sinkexport.serve.errors import ApiError

HIGH, LOW = 64, 16
"""Pieces not taken at which a conversation is paused, and at which it goes on."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an answer. The last one has a finish_reason, or an error, or tells that the client is gone.

    position: tokens that the stream has taken, at the end. prompt_tokens, answer_tokens: fed so far.
    """

    text: str = ""
    finish_reason: str | None = None
    error: ApiError | None = None
    gone: bool = False
    answer_tokens: int = 0
    position: int = 0


class Outlet:
    """One request's way back. Made and read in the event loop; the engine's thread sends.

    The counters have one writer each: `sent` the engine, `taken` the loop. `paused` is set by the engine before it
    looks at `taken` again, and read by the loop after it has changed `taken`: one of the two sees the other's.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Piece] = asyncio.Queue()
        self.sent = 0
        self.taken = 0
        self.paused = False
        self.paused_since = 0.0
        self.arrived = time.perf_counter()
        self.has_stream = False
        self.first_token: float | None = None

    @property
    def backlog(self) -> int:
        """Pieces sent and not taken."""
        return self.sent - self.taken

    async def take(self) -> Piece:
        """The next piece."""
        piece = await self.queue.get()
        self.taken += 1
        return piece
