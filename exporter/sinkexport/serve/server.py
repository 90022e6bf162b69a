"""Engine, application and web server put together."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Mapping
from typing import Any

import uvicorn
from fastapi import FastAPI
from sinkrt import Session

from sinkexport.serve.app import create_app
from sinkexport.serve.engine import Engine
from sinkexport.serve.metrics import Metrics
from sinkexport.serve.prompts import Prompts
from sinkexport.serve.settings import Limits

KEEP_ALIVE_S = 30


class Server:
    """A server over `session`, which nobody else may use while it runs.

    model_name: what clients call the model; None for the bundle's name of it. pin_system: refuse system messages that
    the sinks do not keep for ever. template_args: variables of the chat template. allow_special: let names of special
    tokens in texts become those tokens. Requests may say otherwise of both.

    Raises: UsageError if the bundle has no tokenizer.
    """

    def __init__(
        self, session: Session, limits: Limits, *, model_name: str | None = None, api_key: str | None = None,
        pin_system: bool = False, log_requests: bool = False, template_args: Mapping[str, Any] | None = None,
        allow_special: bool = False,
    ) -> None:  # fmt: skip
        if template_args:  # a variable that the template does not read is refused now, not with every request
            session.tokenizer.render_chat([{"role": "user", "content": "?"}], template_args=template_args)
        self.model = model_name or session.manifest.model.name
        metrics = Metrics()
        self.engine = Engine(session, limits, metrics)
        self._prompts = Prompts(session.tokenizer, dict(template_args or {}), allow_special,
                                session.require_pinned if pin_system else None,
                                lambda: self._uvicorn.should_exit)  # fmt: skip
        self.app = create_app(
            self.engine, self._prompts, metrics, limits, model=self.model, batch=session.batch, api_key=api_key
        )
        self.app.router.lifespan_context = self._lifespan
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                self.app, http="h11", ws="none", lifespan="on", server_header=False,
                log_level="info" if log_requests else "warning", access_log=log_requests,
                timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=int(limits.grace_s),
            )
        )  # fmt: skip

    @property
    def started(self) -> bool:
        """Whether requests are answered."""
        return self._uvicorn.started

    def run(self, listener: socket.socket) -> None:
        """Serve until a signal or `stop`."""
        try:
            self._uvicorn.run(sockets=[listener])
        finally:
            self.engine.stop()  # a second Ctrl-C skips the orderly way

    def stop(self) -> None:
        """End `run`, from any thread, once requests at work are done or their time of grace is over."""
        self._uvicorn.should_exit = True

    @contextlib.asynccontextmanager
    async def _lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        self.engine.start()
        try:
            yield
        finally:
            self._prompts.close()
            self.engine.stop()
