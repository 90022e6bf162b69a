"""The web application: routes, limits and errors."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import fastapi
import numpy as np
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from sinkrt import Session, SinkError
from sinkrt.scheduler import Event
from sinkrt.text import Tokenizer
from starlette.exceptions import HTTPException

from sinkexport import __version__
from sinkexport.serve.engine import Accepted, Engine, Message, Refused, Request
from sinkexport.serve.metrics import Metrics
from sinkexport.serve.middleware import BodyLimit, KeyCheck, RequestCount
from sinkexport.serve.protocol import ApiError, ChatRequest, CompletionRequest, Reply, usage

DISCONNECT_CHECK_S = 0.25
RETRY_AFTER_S = 1


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """model_name: what clients call the bundle. api_key: None for none. max_*: limits of one request.

    pin_system: refuse system messages that the sinks do not keep for ever.
    """

    model_name: str
    api_key: str | None = None
    max_prompt_tokens: int = 32768
    max_tokens: int = 1024
    max_body_bytes: int = 2**20
    pin_system: bool = False


def make_app(session: Session, engine: Engine, options: ServerOptions) -> fastapi.FastAPI:
    """The application. It starts `engine` when it starts and stops it when it ends."""

    @contextlib.asynccontextmanager
    async def lifespan(_app: fastapi.FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)

    app = fastapi.FastAPI(title="sinkexport", version=__version__, lifespan=lifespan, openapi_url=None)
    metrics = Metrics(engine)
    _add_errors(app)
    server = _Server(session, engine, options, metrics)

    app.add_middleware(BodyLimit, max_bytes=options.max_body_bytes)
    app.add_middleware(KeyCheck, api_key=options.api_key)
    app.add_middleware(RequestCount, count=lambda route, status: metrics.requests.labels(route, str(status)).inc())

    @app.get("/health")
    async def health() -> Response:
        failure = engine.failure
        status = 200 if failure is None else 503
        return JSONResponse({"status": "ok" if failure is None else "failed", "reason": failure}, status)

    @app.get("/metrics")
    async def metrics_text() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [server.model_facts()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        server.check_model(name)
        return server.model_facts()

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: fastapi.Request) -> Response:
        server.check_model(body.model)
        prompt = await asyncio.to_thread(server.chat_prompt, body)
        return await server.respond(body, prompt, Reply("chat", options.model_name), request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: fastapi.Request) -> Response:
        server.check_model(body.model)
        prompt = await asyncio.to_thread(server.text_prompt, body)
        return await server.respond(body, prompt, Reply("text", options.model_name), request)

    @app.delete("/v1/conversations/{name}")
    async def forget(name: str) -> dict[str, Any]:
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        found: list[bool] = []

        def tell(known: bool) -> None:
            found.append(known)
            loop.call_soon_threadsafe(done.set)

        engine.forget(name, tell)
        await done.wait()
        if not found[0]:
            raise ApiError(404, f"conversation: received '{name}', expected one that has begun", "unknown_conversation")
        return {"id": name, "object": "conversation.deleted", "deleted": True}

    return app


class _Server:
    """What the routes share."""

    def __init__(self, session: Session, engine: Engine, options: ServerOptions, metrics: Metrics) -> None:
        self._session, self._engine, self._options, self._metrics = session, engine, options, metrics
        self._tokenizer: Tokenizer = session.tokenizer
        self._created = int(time.time())

    def model_facts(self) -> dict[str, Any]:
        return {"id": self._options.model_name, "object": "model", "created": self._created, "owned_by": "sinkexport"}

    def check_model(self, name: str) -> None:
        """Raises: ApiError."""
        if name != self._options.model_name:
            message = f"model: received '{name}', expected '{self._options.model_name}'; see /v1/models"
            raise ApiError(404, message, "model_not_found", "model")

    def chat_prompt(self, body: ChatRequest) -> Request:
        """Raises: ApiError, UsageError."""
        tokenizer, messages = self._tokenizer, [message.plain() for message in body.messages]
        system = next((m["content"] for m in messages if m["role"] == "system"), None)
        if self._options.pin_system and system is not None:
            self._session.require_pinned(system)
        ids = tokenizer.encode(tokenizer.render_chat(messages), special=False)
        next_ids = None
        if body.conversation is not None and len(messages) == 1 and messages[0]["role"] == "user":
            next_ids = tokenizer.encode_next(tokenizer.render_next_turn(messages[0]["content"]))
        return self._request(body, ids, next_ids)

    def text_prompt(self, body: CompletionRequest) -> Request:
        """Raises: ApiError, UsageError."""
        prompt = body.single_prompt()
        if isinstance(prompt, str):
            return self._request(body, self._tokenizer.encode(prompt), self._tokenizer.encode_next(prompt))
        return self._request(body, prompt, prompt)

    def _request(self, body: ChatRequest | CompletionRequest, ids: list[int], next_ids: list[int] | None) -> Request:
        limit = self._options.max_prompt_tokens
        if not 1 <= len(ids) <= limit:
            raise ApiError(400, f"prompt: received {len(ids)} tokens, expected 1 .. {limit}", "context_length_exceeded")
        vocab_size = self._session.manifest.model.vocab_size
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise ApiError(400, f"prompt: received a token id outside 0 .. {vocab_size - 1}", param="prompt")
        return Request(
            np.array(ids, dtype=np.int64), body.sampling(), body.params(self._options.max_tokens), body.conversation,
            None if next_ids is None else np.array(next_ids, dtype=np.int64),
        )  # fmt: skip

    async def respond(
        self, body: ChatRequest | CompletionRequest, prompt: Request, reply: Reply, request: fastapi.Request
    ) -> Response:
        """Submit and wait for the answer, or stream it."""
        answer = _RunningAnswer(self._engine, self._metrics)
        accepted = await answer.begin(prompt)
        if body.conversation is not None:
            reply.conversation = {"id": body.conversation, "new": accepted.new}
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            events = self._streamed(answer, reply, include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        text: list[str] = []
        async with answer:
            async for event in answer.events(request.is_disconnected):
                text.append(event.text)
        return JSONResponse(reply.whole("".join(text), answer.finish_reason, answer.usage()))

    async def _streamed(self, answer: _RunningAnswer, reply: Reply, include_usage: bool) -> AsyncIterator[str]:
        """Server-sent events. Whoever reads them may go away: then this is closed, and the answer cancelled."""
        async with answer:
            yield _sse(reply.piece("", first=True))
            try:
                async for event in answer.events():
                    if event.text:
                        yield _sse(reply.piece(event.text))
            except ApiError as error:  # too late for a status
                yield _sse(error.body())
                return
            yield _sse(reply.piece(None, answer.finish_reason))
            if include_usage:
                yield _sse(reply.last(answer.usage()))
            yield "data: [DONE]\n\n"


class _RunningAnswer:
    """One answer, from the engine's thread into this event loop. Leaving it as a context cancels what is not over."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self._engine, self._metrics = engine, metrics
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._accepted: Accepted | None = None
        self._last: Event | None = None
        self._over = False

    async def begin(self, request: Request) -> Accepted:
        """Raises: ApiError if the engine refuses."""
        loop, self._start = asyncio.get_running_loop(), time.perf_counter()

        def deliver(message: Message) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
                loop.call_soon_threadsafe(self._messages.put_nowait, message)

        self._engine.submit(request, deliver)
        message = await self._messages.get()
        if isinstance(message, Accepted):
            self._accepted = message
            self._metrics.reused_tokens.inc(message.reused_tokens)
            return message
        if isinstance(message, Refused):
            raise ApiError(message.status, message.message, message.code)
        raise RuntimeError(f"the engine began an answer with {message}")

    async def events(self, gone: Callable[[], Awaitable[bool]] | None = None) -> AsyncIterator[Event]:
        """Events up to the last. gone: asked now and then whether the caller still listens.

        Raises: ApiError if the answer fails.
        """
        first_text: float | None = None
        next_check = time.perf_counter() + DISCONNECT_CHECK_S
        while True:
            if gone is not None and time.perf_counter() >= next_check:
                next_check = time.perf_counter() + DISCONNECT_CHECK_S
                if await gone():
                    raise ApiError(499, "the client has gone")
            try:
                message = await asyncio.wait_for(self._messages.get(), DISCONNECT_CHECK_S)
            except TimeoutError:
                continue
            if isinstance(message, Refused):
                self._over = True
                raise ApiError(message.status, message.message, message.code)
            if not isinstance(message, Event):
                raise RuntimeError(f"the engine went on with {message}")
            self._last = message
            if message.text and first_text is None:
                first_text = time.perf_counter()
                self._metrics.first_token.observe(first_text - self._start)
            if message.finish_reason is not None:
                self._over = True
                self._count(message, first_text)
                if message.finish_reason == "error":
                    raise ApiError(500, f"the answer failed: {message.error}", "answer_failed")
                yield message
                return
            yield message

    @property
    def finish_reason(self) -> str:
        """Of an answer that is over."""
        return (self._last.finish_reason if self._last else None) or "stop"

    def usage(self) -> dict[str, Any]:
        """Of an answer that is over."""
        reused = self._accepted.reused_tokens if self._accepted else 0
        prompt, answer = (self._last.prompt_tokens, self._last.answer_tokens) if self._last else (0, 0)
        return usage(prompt + reused, answer, reused)

    async def __aenter__(self) -> _RunningAnswer:
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._over and self._accepted is not None:
            self._metrics.cancelled.inc()
            self._engine.cancel(self._accepted.conversation)

    def _count(self, event: Event, first_text: float | None) -> None:
        self._metrics.prompt_tokens.inc(event.prompt_tokens)
        self._metrics.answer_tokens.inc(event.answer_tokens)
        if first_text is not None and event.answer_tokens > 1:
            self._metrics.per_token.observe((time.perf_counter() - first_text) / (event.answer_tokens - 1))


def _add_errors(app: fastapi.FastAPI) -> None:
    """Every error in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def _api(_request: fastapi.Request, error: ApiError) -> Response:
        return _error_response(error)

    @app.exception_handler(SinkError)
    async def _sink(_request: fastapi.Request, error: SinkError) -> Response:
        return _error_response(ApiError(400, str(error)))

    @app.exception_handler(RequestValidationError)
    async def _invalid(_request: fastapi.Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return _error_response(ApiError(400, f"{where or 'body'}: {first['msg']}", "invalid_value", where or None))

    @app.exception_handler(HTTPException)
    async def _http(_request: fastapi.Request, error: HTTPException) -> Response:
        return _error_response(ApiError(error.status_code, str(error.detail)), error.headers)

    @app.exception_handler(Exception)
    async def _bug(_request: fastapi.Request, error: Exception) -> Response:
        return _error_response(ApiError(500, f"unexpected {type(error).__name__}: a bug of the server"))


def _error_response(error: ApiError, headers: Any = None) -> Response:
    headers = dict(headers or {})
    if error.status == 429:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    return JSONResponse(error.body(), error.status, headers)


def _sse(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
