"""The way from the decode loop's thread to the event loop: pieces of an answer, with a bound on what waits."""

from __future__ import annotations

import asyncio
import dataclasses
import time

from sinkrt.logit_rules import TokenLogprob

from sinkexport.serve.errors import ApiError

HIGH, LOW = 64, 16
"""Pieces not taken at which a conversation is paused, and at which it goes on."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an answer. The last one has a finish_reason or an error, or says that the client is gone.

    position: tokens that the stream has taken, at the end. answer_tokens: fed so far. choice: which of the answers.
    logprobs: of the tokens since the last piece, if they are asked for.
    """

    text: str = ""
    finish_reason: str | None = None
    error: ApiError | None = None
    gone: bool = False
    answer_tokens: int = 0
    position: int = 0
    choice: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


class ResponseQueue:
    """The pieces of one answer. Made and read in the event loop; the decode loop's thread sends.

    choice: which of a request's answers it is. queue: where the pieces of all of them go. owner: name of the key that
    the request came with.

    Each counter has one writer: the decode loop writes `sent`, the event loop writes `taken`. The decode loop sets
    `paused` before it looks at `taken` again. The event loop reads `paused` after it has changed `taken`. So one of
    the two sees what the other wrote.
    """

    def __init__(self, choice: int = 0, queue: asyncio.Queue[Piece] | None = None, owner: str = "") -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Piece] = asyncio.Queue() if queue is None else queue
        self.choice, self.owner = choice, owner
        self.prompt_tokens = self.answer_tokens = 0  # fed so far
        self.sent = 0
        self.taken = 0
        self.paused = False
        self.paused_since = 0.0
        self.arrived = time.perf_counter()
        self.has_stream = False
        self.first_token: float | None = None

    @property
    def backlog(self) -> int:
        """Number of pieces sent and not taken."""
        return self.sent - self.taken

    def wants(self) -> bool:
        """Count a piece that was taken. Returns whether the answer is paused and may go on."""
        self.taken += 1
        return self.paused and self.backlog <= LOW
