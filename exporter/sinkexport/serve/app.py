"""The HTTP application: routes, and what every error looks like."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import FastAPI
from sinkrt import UsageError
from sinkrt.contract import StreamFacts
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from sinkexport.serve.body import check_content_type, parse
from sinkexport.serve.decode_loop import DecodeLoop
from sinkexport.serve.errors import ApiError, shown
from sinkexport.serve.forms import ChatForm, CompletionForm, Form, ResponsesForm
from sinkexport.serve.keys import ApiKeys
from sinkexport.serve.metrics import CONTENT_TYPE, Metrics
from sinkexport.serve.middleware import Middleware, owner_of
from sinkexport.serve.page import add_page
from sinkexport.serve.prompts import Prompts
from sinkexport.serve.request_handler import Render, RequestHandler, RequestLimit, Wanted
from sinkexport.serve.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Fields,
    Request,
    ResponsesRequest,
    TokenizeRequest,
)
from sinkexport.serve.response_store import ResponseStore
from sinkexport.serve.settings import Limits

READ = ["GET", "HEAD"]

R = TypeVar("R", bound=Fields)


def create_app(
    decode_loop: DecodeLoop,
    prompts: Prompts,
    metrics: Metrics,
    limits: Limits,
    *,
    model: str,
    stream: StreamFacts,
    keys: ApiKeys | None,
) -> FastAPI:
    """Create the application over a running decode loop.

    model: what clients call it. stream: of the session's bundle.
    """
    # Without its pages of documentation, which would load scripts from elsewhere.
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.add_middleware(Middleware, metrics=metrics, keys=keys, max_body_bytes=limits.max_body_bytes)
    answer = _Answer(decode_loop, limits, model, stream.batch)
    facts = {
        "id": model,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "sinkexport",
        "stream": {"num_sink_tokens": stream.num_sink_tokens, "window_size": stream.window_size},
    }

    @app.api_route("/v1/models", methods=READ)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [facts]})

    @app.api_route("/v1/models/{name:path}", methods=READ)
    async def one_model(name: str) -> Response:
        answer.check_model(name)
        return JSONResponse(facts)

    @app.api_route("/v1/conversations/{name}", methods=READ)
    async def conversation(http: HttpRequest, name: str) -> Response:
        position, at_work = await decode_loop.position(owner_of(http.scope), name)
        return JSONResponse({"id": name, "object": "conversation", "position": position, "at_work": at_work})

    @app.delete("/v1/conversations/{name}")
    async def forget(http: HttpRequest, name: str) -> Response:
        await decode_loop.delete(owner_of(http.scope), name)
        return JSONResponse({"id": name, "object": "conversation.deleted", "deleted": True})

    @app.api_route("/health", methods=READ)
    async def health() -> Response:
        if decode_loop.failure is not None:
            return JSONResponse({"status": "failed", "reason": decode_loop.failure}, 503)
        return JSONResponse({"status": "ready"})

    @app.api_route("/metrics", methods=READ)
    async def prometheus() -> Response:
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    add_page(app, READ)
    _add_answers(app, answer, prompts, limits, model)
    _add_responses(app, answer, prompts, limits, model)
    _add_tokens(app, answer, prompts, limits)
    _handle_errors(app)
    return app


def _add_answers(app: FastAPI, answer: _Answer, prompts: Prompts, limits: Limits, model: str) -> None:
    """Add the routes that answer with text, and those that clients look for and that there are not."""

    def form_of(
        kind: type[ChatForm] | type[CompletionForm], body: ChatRequest | CompletionRequest
    ) -> ChatForm | CompletionForm:
        return kind(
            model,
            body.choices,
            logprobs=body.reported_logprobs is not None,
            token_bytes=prompts.token_bytes,
            include_usage=body.include_usage,
        )

    @app.post("/v1/chat/completions")
    async def chat(http: HttpRequest) -> Response:
        body = await _read(http, ChatRequest, limits.body_s)
        return await answer(http, body, lambda new: prompts.chat(body.chat, new), form_of(ChatForm, body))

    @app.post("/v1/completions")
    async def completions(http: HttpRequest) -> Response:
        body = await _read(http, CompletionRequest, limits.body_s)
        return await answer(http, body, lambda new: prompts.completion(body, new), form_of(CompletionForm, body))

    @app.post("/v1/embeddings")
    async def embeddings() -> Response:
        raise ApiError(
            400, "embeddings: this server generates text; it has no model for embeddings", code="not_supported"
        )


def _add_responses(app: FastAPI, answer: _Answer, prompts: Prompts, limits: Limits, model: str) -> None:
    """Add the routes of responses, which are kept for a while."""
    store = ResponseStore(limits.max_stored_bytes)

    @app.post("/v1/responses")
    async def responses(http: HttpRequest) -> Response:
        body = await _read(http, ResponsesRequest, limits.body_s)
        owner = owner_of(http.scope)
        messages = body.messages(store, owner)

        def keep(response: dict[str, Any]) -> None:
            if body.store is not False:
                store.keep(owner, response, messages)

        form = ResponsesForm(model, body, token_bytes=prompts.token_bytes, keep=keep)
        return await answer(http, body, lambda new: prompts.chat(body.chat(messages), new), form)

    @app.api_route("/v1/responses/{name}", methods=READ)
    async def stored(http: HttpRequest, name: str) -> Response:
        return JSONResponse(store.get(owner_of(http.scope), name).response)

    @app.delete("/v1/responses/{name}")
    async def drop(http: HttpRequest, name: str) -> Response:
        store.drop(owner_of(http.scope), name)
        return JSONResponse({"id": name, "object": "response", "deleted": True})


def _add_tokens(app: FastAPI, answer: _Answer, prompts: Prompts, limits: Limits) -> None:
    """Add the routes for texts and ids."""

    @app.post("/tokenize")
    async def tokenize(http: HttpRequest) -> Response:
        body = await _read(http, TokenizeRequest, limits.body_s)
        answer.check_model(body.model)
        ids = await prompts.tokens(body)
        found: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": limits.max_prompt_tokens}
        if body.return_token_strs:
            found["token_strs"] = [prompts.token_bytes(token).decode("utf-8", "replace") for token in ids]
        return JSONResponse(found)

    @app.post("/detokenize")
    async def detokenize(http: HttpRequest) -> Response:
        body = await _read(http, DetokenizeRequest, limits.body_s)
        answer.check_model(body.model)
        text = await prompts.text(body.tokens)
        return JSONResponse({"prompt": text, "content": text})


class _Answer:
    """Answers requests for text. model: what clients call it. batch: B, most answers to one request."""

    def __init__(self, decode_loop: DecodeLoop, limits: Limits, model: str, batch: int) -> None:
        self._decode_loop, self._limits, self._model = decode_loop, limits, model
        # No more than conversations: so the scheduler always finds one that it may forget for a new one.
        self._request_limit = RequestLimit(min(batch + limits.max_waiting, limits.max_conversations))
        self._most_choices = min(batch, limits.max_conversations)

    async def __call__(self, http: HttpRequest, body: Request, render: Render, form: Form) -> Response:
        """Answer a request whose prompt `render` makes.

        Raises: ApiError, UsageError.
        """
        self.check_model(body.model)
        self._check(body)
        owner, params = owner_of(http.scope), body.answer_params(self._limits.max_tokens)
        wanted = Wanted(body.samplings, params, body.conversation, owner)
        handler = RequestHandler(self._decode_loop, self._limits, self._request_limit, wanted)
        streams = False
        try:
            await handler.begin(render)
            streams = body.stream
            return handler.stream(form) if streams else await handler.whole(http, form)
        finally:
            if not streams:
                handler.close()

    def _check(self, body: Request) -> None:
        wanted, most = body.max_answer_tokens, self._limits.max_tokens
        if wanted is not None and wanted > most:
            raise ApiError(400, f"max_tokens: received {shown(wanted)}, expected at most {most}", param="max_tokens")
        if body.choices > self._most_choices:
            raise ApiError(
                400,
                f"n: received {body.choices}, expected at most {self._most_choices}, the streams of this server",
                param="n",
            )
        if body.choices > 1 and body.conversation is not None:
            raise ApiError(400, f"n: received {body.choices}, expected 1 in a named conversation", param="n")

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
        async def respond(http: HttpRequest, error: Exception) -> Response:
            found = to_api(error)
            if found.status == HTTPStatus.METHOD_NOT_ALLOWED:
                found = ApiError(found.status, found.message, headers={"Allow": _allowed(app, http)})
            return found.response()

        app.add_exception_handler(kind, respond)

    handler(ApiError, lambda error: error if isinstance(error, ApiError) else _internal())
    handler(UsageError, lambda error: ApiError(400, str(error)))
    handler(HTTPException, _from_http)
    handler(Exception, lambda _: _internal())  # the traceback goes to the log


def _allowed(app: FastAPI, http: HttpRequest) -> str:
    """Methods that all routes of a request's path take together; Starlette names those of the first one."""
    partial = [route for route in app.routes if route.matches(http.scope)[0] is Match.PARTIAL]
    return ", ".join(sorted({method for route in partial for method in getattr(route, "methods", None) or ()}))


def _from_http(error: Exception) -> ApiError:
    if not isinstance(error, HTTPException):
        return _internal()
    return ApiError(error.status_code, str(error.detail), headers=error.headers)


def _internal() -> ApiError:
    return ApiError(500, "internal error; see the server's log")
