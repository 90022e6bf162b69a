"""What every request passes before it is read: counting, who may ask, and the bound on its size."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sinkexport.serve.errors import ApiError
from sinkexport.serve.metrics import Metrics

OPEN_PATHS = ("/health",)
"""What supervisors ask without a key."""


class Guard:
    """ASGI middleware around the whole application.

    Raises nothing: what is refused gets its answer here, in OpenAI's form.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, api_key: str | None, max_body_bytes: int) -> None:
        self._app = app
        self._metrics = metrics
        self._key = None if api_key is None else _digest(api_key.encode())
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the start and the end of the server
            await self._app(scope, receive, send)
            return
        status = 499  # no response: the client has gone

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._checked(scope, receive, counted)
        except ClientDisconnect:
            pass
        except ApiError as error:  # a body that turned out too large while it was read
            await error.response()(scope, receive, counted)
        except Exception:
            status = 500  # its answer is written further out
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")  # never the path itself: anybody can invent paths
            self._metrics.requests.labels(route, str(status)).inc()

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if self._key is None:
            if not is_local_name(headers.get(b"host", b"").decode("latin-1")):
                raise ApiError(403, "a server without an API key is asked by address or as 'localhost' only")
        elif scope["path"] not in OPEN_PATHS and not self._knows_key(headers):
            raise ApiError(401, "no valid API key; send 'Authorization: Bearer KEY'")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise self._too_large()
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                if read > self._max_body_bytes:
                    raise self._too_large()
            return message

        await self._app(scope, bounded, send)

    def _knows_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        # Digests have one length, so that the comparison takes as long for every key.
        return hmac.compare_digest(_digest(key.strip()), self._key or b"") and scheme.lower() == b"bearer"

    def _too_large(self) -> ApiError:
        return ApiError(413, f"request body: received more than expected, at most {self._max_body_bytes} bytes")


def is_local_name(host: str) -> bool:
    """Whether a Host header names an address or this machine.

    A web page can let a name of its own point to this machine and then read all that a server without a key says; it
    cannot do so with an address.
    """
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name.lower() == "localhost" or name.lower().endswith(".localhost")
    return True


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
