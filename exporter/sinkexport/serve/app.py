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
from sinkexport.serve.decode_loop import Engine
from sinkexport.serve.errors import ApiError, shown
from sinkexport.serve.metrics import CONTENT_TYPE, Metrics
from sinkexport.serve.middleware import Guard
from sinkexport.serve.prompts import Prompts
from sinkexport.serve.protocol import ChatRequest, CompletionRequest, Request
from sinkexport.serve.request_handler import Exchange, Render, Slots
from sinkexport.serve.responses import Form
from sinkexport.serve.settings import Limits

READ = ["GET", "HEAD"]

R = TypeVar("R", bound=Request)


def create_app(
    engine: Engine,
    prompts: Prompts,
    metrics: Metrics,
    limits: Limits,
    *,
    model: str,
    batch: int,
    api_key: str | None,
) -> FastAPI:
    """The application over a running engine.

    model: what clients call it. batch: B, streams of the session.
    """
    # Without its pages of documentation, which would load scripts from elsewhere.
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.add_middleware(Guard, metrics=metrics, api_key=api_key, max_body_bytes=limits.max_body_bytes)
    # No more than conversations: so the scheduler always finds one that it may forget for a new one.
    slots = Slots(min(batch + limits.max_waiting, limits.max_conversations))
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
        _check_model(name)
        return JSONResponse(facts)

    @app.delete("/v1/conversations/{name}")
    async def forget(name: str) -> Response:
        await engine.delete(name)
        return JSONResponse({"id": name, "object": "conversation.deleted", "deleted": True})

    @app.api_route("/health", methods=READ)
    async def health() -> Response:
        if engine.failure is not None:
            return JSONResponse({"status": "failed", "reason": engine.failure}, 503)
        return JSONResponse({"status": "ready"})

    @app.api_route("/metrics", methods=READ)
    async def prometheus() -> Response:
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def answer(http: HttpRequest, body: Request, render: Render, *, chat: bool) -> Response:
        _check_model(body.model)
        wanted = body.max_answer_tokens
        if wanted is not None and wanted > limits.max_tokens:
            raise ApiError(
                400, f"max_tokens: received {shown(wanted)}, expected at most {limits.max_tokens}", param="max_tokens"
            )
        form = Form(model, chat=chat, include_usage=bool(body.stream_options and body.stream_options.include_usage))
        exchange = Exchange(engine, limits, slots)
        streams = False
        try:
            await exchange.begin(render, body.conversation, body.sampling, body.answer_params(limits.max_tokens))
            streams = body.stream
            return exchange.stream(form) if streams else await exchange.whole(http, form)
        finally:
            if not streams:
                exchange.close()

    def _check_model(name: str | None) -> None:
        if name is not None and name != model:
            raise ApiError(
                404,
                f"model {shown(name)} does not exist, this server has '{model}'",
                param="model",
                code="model_not_found",
            )

    _handle_errors(app)
    return app


async def _read(http: HttpRequest, kind: type[R], seconds: float) -> R:
    """The request's body, which may take so long to arrive.

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
    handler(HTTPException, _of_http)
    handler(Exception, lambda _: _internal())  # the traceback goes to the log


def _of_http(error: Exception) -> ApiError:
    if not isinstance(error, HTTPException):
        return _internal()
    return ApiError(error.status_code, str(error.detail), headers=error.headers)  # Allow, of a 405


def _internal() -> ApiError:
    return ApiError(500, "internal error; the server's log tells more")
