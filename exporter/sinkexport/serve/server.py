"""Decode loop, application and web server put together."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from sinkrt import Session
from sinkrt.conversation_folder import ConversationFolder
from sinkrt.prefix_store import open_prefix_store

from sinkexport.serve.app import create_app
from sinkexport.serve.connections import ACCEPT_BATCH, Connection, ConnectionTable, free_files
from sinkexport.serve.decode_loop import DecodeLoop
from sinkexport.serve.keys import ApiKeys
from sinkexport.serve.log import bounded_log
from sinkexport.serve.metrics import Metrics
from sinkexport.serve.prompts import Prompts
from sinkexport.serve.settings import BACKLOG, Limits

FAREWELL_S = 1.0
"""How long answers that are cut short get to say so, and then how long their connections get to close."""


class Server:
    """A server over `session`, which nobody else may use while it runs.

    model_name: what clients call the model; None for the bundle's name of it.
    api_keys: keys that clients must send, by name; None: anybody on this machine may ask.
    pin_system: refuse system messages that the sinks do not keep forever.
    template_args: variables of the chat template. allow_special: let names of special tokens in prompts of completions
    become those tokens. A request may change both for itself.
    prefix_dir: folder that keeps beginnings of prompts; None: they end with the server. state_dir: the same of named
    conversations.

    Raises: UsageError if the bundle has no tokenizer, too few files may be open, or the folder cannot be written.
    """

    def __init__(
        self,
        session: Session,
        limits: Limits,
        *,
        model_name: str | None = None,
        api_keys: Mapping[str, str] | None = None,
        pin_system: bool = False,
        log_requests: bool = False,
        template_args: Mapping[str, Any] | None = None,
        allow_special: bool = False,
        prefix_dir: Path | None = None,
        state_dir: Path | None = None,
    ) -> None:
        if template_args:  # a variable that the template does not read is refused now, not with every request
            session.tokenizer.render_chat([{"role": "user", "content": "?"}], template_args=template_args)
        self.model = model_name or session.manifest.model.name
        metrics = Metrics()
        prefixes = None
        if limits.max_prefix_bytes:
            manifest, most = session.manifest, limits.max_prefix_dir_bytes
            prefixes = open_prefix_store(manifest, limits.max_prefix_bytes, prefix_dir, most)
        folder = None
        if state_dir is not None:
            folder = ConversationFolder(state_dir, session.manifest, limits.max_state_bytes)
        self.decode_loop = DecodeLoop(session, limits, metrics, prefixes, folder)
        self._prompts = Prompts(
            session.tokenizer,
            dict(template_args or {}),
            allow_special,
            session.require_pinned if pin_system else None,
            session.grammars,
            lambda: self._uvicorn.should_exit,
            limits.max_prompt_tokens,
        )
        self.app = create_app(
            self.decode_loop,
            self._prompts,
            metrics,
            limits,
            model=self.model,
            stream=session.manifest.stream,
            keys=None if api_keys is None else ApiKeys(api_keys),
        )
        self.app.router.lifespan_context = self._lifespan
        self.connections = ConnectionTable(limits, free_files())
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                self.app,
                loop="asyncio",
                http=cast(Any, functools.partial(Connection, table=self.connections)),
                ws="none",
                lifespan="on",
                server_header=False,
                backlog=ACCEPT_BATCH,
                log_level="info" if log_requests else "warning",
                access_log=log_requests,
                timeout_graceful_shutdown=int(limits.grace_s + 3 * FAREWELL_S),
            ),
            self.decode_loop,
            self.connections,
            limits.grace_s,
        )

    @property
    def started(self) -> bool:
        """Whether requests are answered."""
        return self._uvicorn.started

    def run(self, listener: socket.socket) -> None:
        """Serve until a signal or `stop`."""
        try:
            with bounded_log():
                self._uvicorn.run(sockets=[listener])
        finally:
            self.decode_loop.stop()  # a second Ctrl-C skips the orderly way

    def stop(self) -> None:
        """End `run`, from any thread, once requests at work are done or their grace period is over."""
        self._uvicorn.should_exit = True

    @contextlib.asynccontextmanager
    async def _lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        self.decode_loop.start()
        try:
            yield
        finally:
            self._prompts.close()
            self.decode_loop.stop()


class _Uvicorn(uvicorn.Server):
    """Uvicorn that accepts few connections at a time, and that no client keeps from ending."""

    def __init__(
        self, config: uvicorn.Config, decode_loop: DecodeLoop, connections: ConnectionTable, grace_s: float
    ) -> None:
        super().__init__(config)
        self._decode_loop, self._table, self._grace_s = decode_loop, connections, grace_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, with the kernel's queue as long as it was: asyncio sets it to the number accepted at a time."""
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(BACKLOG)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End in three steps: a grace period for answers, an error event for those left, then all connections close."""
        loop = asyncio.get_running_loop()
        timers = [
            loop.call_later(self._grace_s, self._decode_loop.request_stop),
            loop.call_later(self._grace_s + FAREWELL_S, self._table.drop_all),
        ]
        try:
            await super().shutdown(sockets)
        finally:
            for timer in timers:
                timer.cancel()
