"""ASGI middleware: limits on bodies, the API key, and a count of requests."""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sinkexport.serve.protocol import ApiError


class BodyLimit:
    """Refuses bodies that are too large before they are held in memory, with a Content-Length or without.

    max_bytes: of a request's body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = ApiError(413, f"body: received more than {self._max_bytes} bytes", "body_too_large")
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._max_bytes:
            await _send_error(send, error)
            return
        # The body is read here, for an application that has begun to answer cannot be told any more.
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client has gone
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_bytes:
                await _send_error(send, error)
                return
        waiting: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        await self._app(scope, replay, send)


class KeyCheck:
    """Asks for ``Authorization: Bearer KEY`` on /v1/; api_key: None lets everybody in."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app, self._wanted = app, None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._wanted is not None and scope["path"].startswith("/v1/"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._wanted):  # takes as long whatever differs
                await _send_error(send, ApiError(401, "a valid API key is needed", "invalid_api_key"))
                return
        await self._app(scope, receive, send)


class RequestCount:
    """Calls ``count(route, status)`` for every response."""

    def __init__(self, app: ASGIApp, count: Callable[[str, int], None]) -> None:
        self._app, self._count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # The pattern and not the path, which callers choose: metrics must not grow with what they make up.
                self._count(getattr(scope.get("route"), "path", "unknown"), message["status"])
            await send(message)

        await self._app(scope, receive, counted)


async def _send_error(send: Send, error: ApiError) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
               (b"connection", b"close")]  # fmt: skip
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
