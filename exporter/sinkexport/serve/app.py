"""The HTTP application: routes, and what every error looks like."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from fastapi import FastAPI
from sinkrt import UsageError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from sinkexport.serve.body import check_content_type, parse
from sinkexport.serve.decode_loop import DecodeLoop
from sinkexport.serve.errors import ApiError, shown
from sinkexport.serve.metrics import CONTENT_TYPE, Metrics
from sinkexport.serve.middleware import Middleware
from sinkexport.serve.prompts import Prompts
from sinkexport.serve.protocol import ChatRequest, CompletionRequest, Request
from sinkexport.serve.request_handler import Render, RequestHandler, RequestLimit
from sinkexport.serve.responses import Form
from sinkexport.serve.settings import Limits

READ = ["GET", "HEAD"]

R = TypeVar("R", bound=Request)


def create_app(
    decode_loop: DecodeLoop,
    prompts: Prompts,
    metrics: Metrics,
    limits: Limits,
    *,
    model: str,
    batch: int,
    api_key: str | None,
) -> FastAPI:
    """Create the application over a running decode loop.

    model: what clients call it. batch: B, streams of the session.
    """
    # Without its pages of documentation, which would load scripts from elsewhere.
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.add_middleware(Middleware, metrics=metrics, api_key=api_key, max_body_bytes=limits.max_body_bytes)
    # No more than conversations: so the scheduler always finds one that it may forget for a new one.
    request_limit = RequestLimit(min(batch + limits.max_waiting, limits.max_conversations))
    answer = _Answer(decode_loop, limits, request_limit, model)
    facts = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "sinkexport"}

    @app.post("/v1/chat/completions")
    async def chat(http: HttpRequest) -> Response:
        body = await _read(http, ChatRequest, limits.body_s)
        return await answer(http, body, lambda new: prompts.chat(body, new), chat=True)

    @app.post("/v1/completions")
    async def completions(http: HttpRequest) -> Response:
        body = await _read(http, CompletionRequest, limits.body_s)
        return await answer(http, body, lambda new: prompts.completion(body, new), chat=False)

    @app.api_route("/v1/models", methods=READ)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [facts]})

    @app.api_route("/v1/models/{name:path}", methods=READ)
    async def one_model(name: str) -> Response:
        answer.check_model(name)
        return JSONResponse(facts)

    @app.delete("/v1/conversations/{name}")
    async def forget(name: str) -> Response:
        await decode_loop.delete(name)
        return JSONResponse({"id": name, "object": "conversation.deleted", "deleted": True})

    @app.api_route("/health", methods=READ)
    async def health() -> Response:
        if decode_loop.failure is not None:
            return JSONResponse({"status": "failed", "reason": decode_loop.failure}, 503)
        return JSONResponse({"status": "ready"})

    @app.api_route("/metrics", methods=READ)
    async def prometheus() -> Response:
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    _handle_errors(app)
    return app


class _Answer:
    """Answers requests for text. model: what clients call it."""

    def __init__(self, decode_loop: DecodeLoop, limits: Limits, request_limit: RequestLimit, model: str) -> None:
        self._decode_loop, self._limits, self._request_limit = decode_loop, limits, request_limit
        self._model = model

    async def __call__(self, http: HttpRequest, body: Request, render: Render, *, chat: bool) -> Response:
        """Answer a request whose prompt `render` makes.

        Raises: ApiError, UsageError.
        """
        self.check_model(body.model)
        wanted, most = body.max_answer_tokens, self._limits.max_tokens
        if wanted is not None and wanted > most:
            raise ApiError(400, f"max_tokens: received {shown(wanted)}, expected at most {most}", param="max_tokens")
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        form = Form(self._model, chat=chat, include_usage=include_usage)
        handler = RequestHandler(self._decode_loop, self._limits, self._request_limit)
        streams = False
        try:
            await handler.begin(render, body.conversation, body.sampling, body.answer_params(most))
            streams = body.stream
            return handler.stream(form) if streams else await handler.whole(http, form)
        finally:
            if not streams:
                handler.close()

    def check_model(self, name: str | None) -> None:
        """Check the model that a request names; None: it names none.

        Raises: ApiError 404.
        """
        if name is not None and name != self._model:
            raise ApiError(
                404,
                f"model {shown(name)} does not exist, this server has '{self._model}'",
                param="model",
                code="model_not_found",
            )


async def _read(http: HttpRequest, kind: type[R], seconds: float) -> R:
    """Read the request's body, which may take `seconds` to arrive.

    Raises: ApiError.
    """
    check_content_type(http.scope)
    try:
        raw = await asyncio.wait_for(http.body(), seconds)
    except TimeoutError:
        raise ApiError(408, f"the request's body did not arrive within {seconds:.0f} s") from None
    return await asyncio.to_thread(parse, raw, kind)


def _handle_errors(app: FastAPI) -> None:
    def handler(kind: type[Exception], to_api: Callable[[Exception], ApiError]) -> None:
        async def respond(_http: HttpRequest, error: Exception) -> Response:
            return to_api(error).response()

        app.add_exception_handler(kind, respond)

    handler(ApiError, lambda error: error if isinstance(error, ApiError) else _internal())
    handler(UsageError, lambda error: ApiError(400, str(error)))
    handler(HTTPException, _from_http)
    handler(Exception, lambda _: _internal())  # the traceback goes to the log


def _from_http(error: Exception) -> ApiError:
    if not isinstance(error, HTTPException):
        return _internal()
    return ApiError(error.status_code, str(error.detail), headers=error.headers)  # a 405 has Allow


def _internal() -> ApiError:
    return ApiError(500, "internal error; see the server's log")
