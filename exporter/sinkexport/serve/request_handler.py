"""One request at work, from its prompt to the last byte of its answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
from sinkrt.answer import AnswerParams
from sinkrt.sampler import SamplingParams
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from sinkexport.serve.conversations import BegunError, Placed, Work
from sinkexport.serve.decode_loop import DecodeLoop
from sinkexport.serve.errors import ApiError
from sinkexport.serve.response_queue import LOW, Piece, ResponseQueue
from sinkexport.serve.responses import DONE, Form, Usage, event
from sinkexport.serve.settings import Limits

MAX_RENDERINGS = 3
"""Tries to render a prompt while others delete its conversation."""

Render = Callable[[bool], Awaitable[list[int]]]
"""Takes whether the prompt begins a conversation; gives the prompt's ids."""


class RequestLimit:
    """Bound on the requests at work. One event loop uses it, so it needs no lock."""

    def __init__(self, count: int) -> None:
        self._free = count

    def acquire(self) -> None:
        """Count one more request.

        Raises: ApiError 429 if as many as may be are at work.
        """
        if not self._free:
            raise ApiError(429, "too many requests are waiting; try again soon")
        self._free -= 1

    def release(self) -> None:
        """Undo one `acquire`."""
        self._free += 1


class RequestHandler:
    """One request at work. It counts towards the limit from `__init__` to `close`, which must be called.

    Raises: ApiError 429.
    """

    def __init__(self, decode_loop: DecodeLoop, limits: Limits, request_limit: RequestLimit) -> None:
        self._decode_loop = decode_loop
        self._limits = limits
        request_limit.acquire()
        self._request_limit = request_limit
        self._responses = ResponseQueue()
        self._open = True
        self._prompt_tokens = 0
        self._name: str | None = None
        self._new = True
        self._placed: Placed | None = None

    async def begin(self, render: Render, name: str | None, sampling: SamplingParams, params: AnswerParams) -> None:
        """Render the prompt and queue it. name: of the conversation, or None.

        Raises: ApiError, UsageError.
        """
        for _ in range(MAX_RENDERINGS):
            new = name is None or not await self._decode_loop.begun(name)
            ids = await render(new)
            self._check(ids)
            work = Work(np.array(ids, dtype=np.int64), sampling, params, name, new)
            try:
                self._placed = await self._decode_loop.submit(work, self._responses)
            except BegunError:
                continue
            self._prompt_tokens, self._name, self._new = len(ids), name, new
            return
        raise ApiError(409, f"conversation '{name}' is being changed by others", param="conversation")

    async def whole(self, http: HttpRequest, form: Form) -> Response:
        """Answer in one piece. A client that goes away cancels the request.

        Raises: ApiError.
        """
        gone = asyncio.ensure_future(_until_gone(http))
        gone.add_done_callback(lambda _: self._responses.queue.put_nowait(Piece(gone=True)))
        texts = []
        try:
            async for piece in self._pieces():
                texts.append(piece.text)
                if piece.gone:
                    return Response(status_code=499)
                if piece.finish_reason is not None:
                    usage = self._usage(piece)
                    return JSONResponse(form.whole("".join(texts), piece.finish_reason, usage, self._facts(piece)))
        finally:
            gone.cancel()
        raise RuntimeError("an answer ended without an end")

    def stream(self, form: Form) -> Response:
        """The response as server-sent events; closes this handler in the end."""
        return _EventStream(self._events(form), self.close)

    def close(self) -> None:
        """Stop counting towards the limit; cancel the request if it is still at work. Closing twice is fine."""
        if self._open:
            self._open = False
            self._decode_loop.release(self._responses)
            self._request_limit.release()

    async def _events(self, form: Form) -> AsyncIterator[bytes]:
        if opening := form.opening():
            yield opening
        try:
            async for piece in self._pieces():
                if piece.text:
                    yield form.part(piece.text)
                if piece.finish_reason is not None:
                    yield form.end(piece.finish_reason, self._usage(piece), self._facts(piece))
        except ApiError as error:  # too late for a status
            yield event(error.body) + DONE

    async def _pieces(self) -> AsyncIterator[Piece]:
        """Yield all pieces up to the last one.

        Raises: ApiError if the answer fails.
        """
        responses = self._responses
        while True:
            piece = await responses.take()
            if responses.paused and responses.backlog <= LOW:
                self._decode_loop.resume(responses)
            if piece.error is not None:
                raise piece.error
            yield piece
            if piece.gone or piece.finish_reason is not None:
                return

    def _check(self, ids: list[int]) -> None:
        if not ids:
            raise ApiError(400, "prompt: received no tokens, expected at least one; give some text")
        if len(ids) > self._limits.max_prompt_tokens:
            raise ApiError(
                400,
                f"prompt: received {len(ids)} tokens, expected at most {self._limits.max_prompt_tokens}",
                code="context_length_exceeded",
            )

    def _usage(self, piece: Piece) -> Usage:
        return Usage(self._prompt_tokens, piece.answer_tokens, self._placed.reused if self._placed else 0)

    def _facts(self, piece: Piece) -> dict[str, Any] | None:
        """What a response says about a named conversation."""
        return None if self._name is None else {"id": self._name, "position": piece.position, "new": self._new}


class _EventStream(StreamingResponse):
    """Server-sent events that call `close` in the end, also if the client is gone before the first one."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must pass on piece by piece
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Starlette has two ways to notice that a client has gone. Some versions of uvicorn announce the newer one (an
        # OSError of `send`, from 2.4 on) and do not support it: the older one works with all.
        scope = {**scope, "asgi": {**scope.get("asgi", {}), "spec_version": "2.3"}}
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _until_gone(http: HttpRequest) -> None:
    """Return when the client has gone. The body must have been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
