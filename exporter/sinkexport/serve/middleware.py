"""Checks that every request passes before it is read: counting, authorization, and bounds on its size."""

from __future__ import annotations

import ipaddress
import re

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sinkexport.serve.errors import ApiError
from sinkexport.serve.keys import ApiKeys
from sinkexport.serve.metrics import Metrics
from sinkexport.serve.page import PAGES

OPEN_PATHS = ("/health", *PAGES)
"""Paths that supervisors and browsers may read without a key."""

READING = ("GET", "HEAD")

MAX_HEADERS = 100
MAX_HEADER_BYTES = 16 * 1024
MAX_PATH_BYTES = 2048

_OWNER = "sinkexport.key"
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9.-]+))(?::([0-9]{1,5}))?")
_LOCAL_NAME = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)*localhost")


class Middleware:
    """ASGI middleware around the whole application. Raises nothing: a refused request gets its error response here.

    keys: None if anybody on this machine may ask. The application finds the name of a request's key with `owner_of`.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, keys: ApiKeys | None, max_body_bytes: int) -> None:
        self._app = app
        self._metrics = metrics
        self._keys = keys
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
            if owner := owner_of(scope):
                self._metrics.key_requests.labels(owner, str(status)).inc()

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        check_size(scope)
        if self._keys is None:
            hosts = values_of(scope, b"host")
            if len(hosts) != 1 or not is_local_name(hosts[0].decode("latin-1")):
                raise ApiError(
                    403,
                    "a server without an API key is asked by address or as 'localhost' only: its Host "
                    "header must say so",
                )
        elif scope["path"] not in OPEN_PATHS or scope["method"] not in READING:
            owner = self._keys.name_of(values_of(scope, b"authorization"))
            if owner is None:
                raise ApiError(401, "no valid API key; send 'Authorization: Bearer KEY'")
            scope[_OWNER] = owner
        if values_of(scope, b"content-length") and values_of(scope, b"transfer-encoding"):
            # What one server on the way takes for a body may be the next request for another (RFC 9112, 6.1).
            message = "Content-Length and Transfer-Encoding: received both, expected one of them"
            raise ApiError(400, message, headers={"Connection": "close"})
        # A second one that differs is refused by the HTTP parser.
        length = next(iter(values_of(scope, b"content-length")), b"0")
        if length.isdigit() and (len(length) > 20 or int(length) > self._max_body_bytes):
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

    def _too_large(self) -> ApiError:
        return ApiError(413, f"request body: received more than expected, at most {self._max_body_bytes} bytes")


def owner_of(scope: Scope) -> str:
    """Name of the key that a request came with; "" if it needs none."""
    return str(scope.get(_OWNER, ""))


def values_of(scope: Scope, name: bytes) -> list[bytes]:
    """List all values of a header, whose name is in lower case."""
    return [value for key, value in scope["headers"] if key == name]


def check_size(scope: Scope) -> None:
    """Bound a request's path and header.

    Raises: ApiError 414 or 431.
    """
    if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_PATH_BYTES:
        raise ApiError(414, f"path: received more than expected, at most {MAX_PATH_BYTES} bytes")
    count = len(scope["headers"])
    if count > MAX_HEADERS or sum(len(key) + len(value) for key, value in scope["headers"]) > MAX_HEADER_BYTES:
        raise ApiError(
            431,
            f"request header: received {count} lines, expected at most {MAX_HEADERS} lines of "
            f"{MAX_HEADER_BYTES} bytes together",
        )


def is_local_name(host: str) -> bool:
    """Whether a Host header is exactly an address or a name of this machine, with or without a port.

    A web page can let a name of its own point to this machine and then read what a server without a key says. It
    cannot do so with an address.
    """
    parts = _HOST.fullmatch(host)
    if parts is None or int(parts[3] or 0) > 65535:
        return False
    try:
        if parts[1] is not None:
            ipaddress.IPv6Address(parts[1])
        else:
            ipaddress.IPv4Address(parts[2])
    except ValueError:
        return parts[2] is not None and _LOCAL_NAME.fullmatch(parts[2].lower()) is not None
    return True
