"""One request at work, from its prompt to the last byte of its answer."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
from sinkrt.answer import AnswerParams
from sinkrt.logit_rules import TokenLogprob
from sinkrt.sampler import SamplingParams
from sinkrt.text.answer_parts import AnswerParts
from sinkrt.text.said import Said
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from sinkexport.serve.conversations import BegunError, Placed, Work
from sinkexport.serve.decode_loop import DecodeLoop
from sinkexport.serve.errors import ApiError
from sinkexport.serve.forms import Answered, Form, Part, Usage
from sinkexport.serve.prompts import Rendered
from sinkexport.serve.response_queue import Piece, ResponseQueue
from sinkexport.serve.settings import Limits

MAX_RENDERINGS = 3
"""Tries to render a prompt while others delete its conversation."""

Render = Callable[[bool], Awaitable[Rendered]]
"""Takes whether the prompt begins a conversation; gives the prompt."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a request asks for, besides its prompt.

    samplings: of each answer. name: of the conversation, or None. owner: name of the key that it came with.
    """

    samplings: tuple[SamplingParams, ...]
    params: AnswerParams
    name: str | None
    owner: str


class _GoneError(Exception):
    """The client has gone."""


class RequestLimit:
    """Bound on the answers at work. One event loop uses it, so it needs no lock."""

    def __init__(self, count: int) -> None:
        self._free = count

    def acquire(self, count: int = 1) -> None:
        """Count some more answers.

        Raises: ApiError 429 if more than may be would be at work.
        """
        if count > self._free:
            raise ApiError(429, "too many requests are waiting; try again soon")
        self._free -= count

    def release(self, count: int = 1) -> None:
        """Undo one `acquire`."""
        self._free += count


class RequestHandler:
    """One request at work. It counts towards the limit from `__init__` to `close`, which must be called.

    Raises: ApiError 429.
    """

    def __init__(self, decode_loop: DecodeLoop, limits: Limits, request_limit: RequestLimit, wanted: Wanted) -> None:
        self._decode_loop = decode_loop
        self._limits = limits
        self._wanted = wanted
        count = len(wanted.samplings)
        request_limit.acquire(count)
        self._request_limit = request_limit
        self._queue: asyncio.Queue[Piece] = asyncio.Queue()  # of all answers
        self._responses = [ResponseQueue(choice, self._queue, wanted.owner) for choice in range(count)]
        self._answers = [_Answer(None)] * count
        self._open = True
        self._prompt_tokens = 0
        self._new = True
        self._placed: Placed | None = None

    async def begin(self, render: Render) -> None:
        """Render the prompt and queue it.

        Raises: ApiError, UsageError.
        """
        wanted = self._wanted
        for _ in range(MAX_RENDERINGS):
            new = wanted.name is None or not await self._decode_loop.begun(wanted.owner, wanted.name)
            rendered = await render(new)
            self._check(rendered.ids)
            parts, params = rendered.parts, dataclasses.replace(wanted.params, grammar=rendered.grammar)
            if parts is not None:  # its marks may be special tokens
                params = dataclasses.replace(params, shown=parts.shown)
            ids = np.array(rendered.ids, dtype=np.int64)
            work = Work(ids, wanted.samplings, params, wanted.name, new, wanted.owner, rendered.opening)
            try:
                self._placed = await self._decode_loop.submit(work, self._responses)
            except BegunError:
                continue
            self._prompt_tokens, self._new = len(ids), new
            self._answers = [_Answer(parts) for _ in self._responses]
            return
        raise ApiError(409, f"conversation '{wanted.name}' is being changed by others", param="conversation")

    async def whole(self, http: HttpRequest, form: Form) -> Response:
        """Answer in one piece. A client that goes away cancels the request.

        Raises: ApiError.
        """
        gone = asyncio.ensure_future(_until_gone(http))
        gone.add_done_callback(lambda _: self._queue.put_nowait(Piece(gone=True)))
        try:
            parts = [part async for part in self._parts()]
        except _GoneError:
            return Response(status_code=499)
        finally:
            gone.cancel()
        answers = [Answered.of([part for part in parts if part.choice == i]) for i in range(len(self._answers))]
        return JSONResponse(form.whole(answers, self._usage))

    def stream(self, form: Form) -> Response:
        """The response as server-sent events; closes this handler in the end."""
        return _EventStream(self._events(form), self.close)

    def close(self) -> None:
        """Stop counting towards the limit; cancel what is still at work. Closing twice is fine."""
        if self._open:
            self._open = False
            for responses in self._responses:
                self._decode_loop.release(responses)
            self._request_limit.release(len(self._responses))

    async def _events(self, form: Form) -> AsyncIterator[bytes]:
        if opening := form.opening():
            yield opening
        try:
            async for part in self._parts():
                if events := form.part(part):
                    yield events
            yield form.end(self._usage)
        except ApiError as error:  # too late for a status
            yield form.failed(error)

    async def _parts(self) -> AsyncIterator[Part]:
        """Yield what the answers grow by, up to the end of the last one.

        Raises: ApiError if an answer fails; _GoneError.
        """
        left = len(self._answers)
        while left:
            piece = await self._queue.get()
            if piece.gone:
                raise _GoneError
            responses = self._responses[piece.choice]
            if responses.wants():
                self._decode_loop.resume(responses)
            if piece.error is not None:
                raise piece.error
            ended = piece.finish_reason is not None
            left -= ended
            part = self._answers[piece.choice].take(piece)
            if ended:
                part = dataclasses.replace(part, facts=self._facts(piece))
            if ended or part.says:
                yield part

    def _check(self, ids: list[int]) -> None:
        if not ids:
            raise ApiError(400, "prompt: received no tokens, expected at least one; give some text")
        if len(ids) > self._limits.max_prompt_tokens:
            raise ApiError(
                400,
                f"prompt: received {len(ids)} tokens, expected at most {self._limits.max_prompt_tokens}",
                code="context_length_exceeded",
            )

    @property
    def _usage(self) -> Usage:
        answers = self._answers
        reasoning = sum(answer.reasoning_tokens for answer in answers) if answers[0].thinks else None
        reused = self._placed.reused if self._placed else 0
        return Usage(self._prompt_tokens, sum(answer.tokens for answer in answers), reused, reasoning)

    def _facts(self, piece: Piece) -> dict[str, Any] | None:
        """What a response says about a named conversation."""
        name = self._wanted.name
        return None if name is None else {"id": name, "position": piece.position, "new": self._new}


class _Answer:
    """One answer as its pieces come. tokens: fed so far. reasoning_tokens: of these, up to the end of the thinking."""

    def __init__(self, parts: AnswerParts | None) -> None:
        self._splitter = None if parts is None else parts.splitter()
        self._thinks = parts is not None and parts.thinks
        self._has_called = False
        self._held: tuple[TokenLogprob, ...] = ()  # of tokens that may begin the thinking
        self.tokens = 0
        self.reasoning_tokens = 0

    @property
    def thinks(self) -> bool:
        """Whether thinking is taken out of it."""
        return self._thinks

    def take(self, piece: Piece) -> Part:
        """Take a piece apart."""
        self.tokens = piece.answer_tokens
        said, thought, logprobs = Said(content=piece.text), False, self._held + piece.logprobs
        if self._splitter is not None:
            thought = self._splitter.is_thinking
            said = self._splitter.push(piece.text)
            self._held = ()
            if piece.finish_reason is not None:
                said += self._splitter.flush()
            elif self._splitter.is_undecided:
                self._held, logprobs = logprobs, ()
            thought = thought or self._splitter.is_thinking or bool(said.reasoning)
        if thought:
            self.reasoning_tokens = self.tokens
        self._has_called = self._has_called or bool(said.calls)
        reason = "tool_calls" if piece.finish_reason == "stop" and self._has_called else piece.finish_reason
        return Part(piece.choice, said.content, said.reasoning, logprobs, reason, thought, calls=said.calls)


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
