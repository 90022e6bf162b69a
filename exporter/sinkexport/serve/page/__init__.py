"""A web page for trying out a server: static files, which need nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import FastAPI
from starlette.responses import Response

PAGES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
"""Paths of the files. They hold no secrets: whoever opens them needs a key for anything else."""

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def add_page(app: FastAPI, methods: list[str]) -> None:
    """Add the page's routes."""
    for path, file in PAGES.items():
        app.api_route(path, methods=methods)(_sender(file))


def _sender(file: str) -> Callable[[], Awaitable[Response]]:
    text = resources.files(__package__).joinpath(file).read_text(encoding="utf-8")
    kind = _TYPES[file.rpartition(".")[2]]

    async def send() -> Response:
        return Response(text, media_type=kind, headers=_HEADERS)

    return send
