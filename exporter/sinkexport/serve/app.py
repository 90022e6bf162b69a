"""The HTTP application: routes, and what every error looks like."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from fastapi import FastAPI
from pydantic import ValidationError
from sinkrt import UsageError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from sinkexport.serve.engine import Engine
from sinkexport.serve.errors import ApiError
from sinkexport.serve.exchange import Exchange, Render, Slots
from sinkexport.serve.guard import Guard
from sinkexport.serve.metrics import CONTENT_TYPE, Metrics
from sinkexport.serve.prompts import Prompts
from sinkexport.serve.protocol import ChatRequest, CompletionRequest, Request
from sinkexport.serve.responses import Form
from sinkexport.serve.settings import Limits

BODY_S = 60.0
"""How long a request may take to arrive."""

R = TypeVar("R", bound=Request)


def create_app(
    engine: Engine, prompts: Prompts, metrics: Metrics, limits: Limits, *, model: str, batch: int, api_key: str | None,
) -> FastAPI:  # fmt: skip
    """The application over a running engine.

    model: what clients call it. batch: B, streams of the session.
    """
    app = FastAPI(openapi_url=None)  # its pages of documentation would load scripts from elsewhere
    app.add_middleware(Guard, metrics=metrics, api_key=api_key, max_body_bytes=limits.max_body_bytes)
    # No more than conversations: so the scheduler always finds one that it may forget for a new one.
    slots = Slots(min(batch + limits.max_waiting, limits.max_conversations))
    facts = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "sinkexport"}

    @app.post("/v1/chat/completions")
    async def chat(http: HttpRequest) -> Response:
        body = await _read(http, ChatRequest)

        return await answer(http, body, lambda new: prompts.chat(body, new), chat=True)

    @app.post("/v1/completions")
    async def completions(http: HttpRequest) -> Response:
        body = await _read(http, CompletionRequest)
        return await answer(http, body, lambda new: prompts.completion(body, new), chat=False)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [facts]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        _check_model(name)
        return JSONResponse(facts)

    @app.delete("/v1/conversations/{name}")
    async def forget(name: str) -> Response:
        await engine.delete(name)
        return JSONResponse({"id": name, "object": "conversation.deleted", "deleted": True})

    @app.get("/health")
    async def health() -> Response:
        if engine.failure is not None:
            return JSONResponse({"status": "failed", "reason": engine.failure}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def answer(http: HttpRequest, body: Request, render: Render, *, chat: bool) -> Response:
        _check_model(body.model)
        wanted = body.max_answer_tokens
        if wanted is not None and wanted > limits.max_tokens:
            raise ApiError(400, f"max_tokens: received {wanted}, expected at most {limits.max_tokens}",
                           param="max_tokens")  # fmt: skip
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
            raise ApiError(404, f"model '{name}' does not exist, this server has '{model}'", param="model",
                           code="model_not_found")  # fmt: skip

    _handle_errors(app)
    return app


async def _read(http: HttpRequest, kind: type[R]) -> R:
    """The request's body.

    Raises: ApiError.
    """
    # Web pages can send other types to a server on this machine without asking anybody.
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(400, "content type: expected application/json")
    try:
        raw = await asyncio.wait_for(http.body(), BODY_S)
    except TimeoutError:
        raise ApiError(408, f"the request's body did not arrive within {BODY_S:.0f} s") from None
    try:
        return await asyncio.to_thread(kind.model_validate_json, raw)
    except ValidationError as error:
        raise _invalid(error) from None


def _invalid(error: ValidationError) -> ApiError:
    """The first thing that is wrong, by its place in the body."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "json_invalid":
        return ApiError(400, f"body: {first['msg']}", code="invalid_json")
    message = "unknown field" if first["type"] == "extra_forbidden" else first["msg"]
    return ApiError(400, f"{where[:100] or 'body'}: {message[:300]}", param=where[:100] or None)


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
    return ApiError(error.status_code, error.detail) if isinstance(error, HTTPException) else _internal()


def _internal() -> ApiError:
    return ApiError(500, "internal error; the server's log tells more")
