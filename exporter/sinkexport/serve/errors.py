"""Errors as OpenAI's clients expect them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

RETRY_AFTER_S = 2
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
_CODES = {401: "invalid_api_key", 413: "request_too_large", 429: "too_many_requests", 503: "unavailable"}

MAX_SHOWN = 60
"""Characters of a received value that a message repeats."""


def shown(value: object) -> str:
    """Show what a client sent as JSON in printable ASCII, cut short: it may be anything."""
    if isinstance(value, str):  # cut first: it may be as long as a request
        value = value[:MAX_SHOWN]
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**MAX_SHOWN:
        return "a huge number"
    elif isinstance(value, (list, dict)):
        kind = "a list" if isinstance(value, list) else "an object"
        return f"{kind} of {len(value)}" if value else f"an empty {kind.split()[1]}"
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


class ApiError(Exception):
    """An error that a request gets as its answer.

    status: HTTP's. message: becomes one line of text that can be sent. param: the field that is wrong.
    code: for programs; None for the status's own code, if it has one. headers: HTTP's, besides those of the status.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        message = " ".join(message.encode("utf-8", "replace").decode().split())
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self._headers = dict(headers or {})
        self.code = code or _CODES.get(status)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object."""
        default = "invalid_request_error" if self.status < 500 else "server_error"
        kind = _TYPES.get(self.status, default)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Mapping[str, str]:
        """HTTP headers that belong to the status."""
        if self.status == 401:
            return {**self._headers, "WWW-Authenticate": "Bearer"}
        return {**self._headers, **({"Retry-After": str(RETRY_AFTER_S)} if self.status in (429, 503) else {})}

    def response(self) -> JSONResponse:
        """The whole HTTP response."""
        return JSONResponse(self.body, self.status, headers=dict(self.headers))
