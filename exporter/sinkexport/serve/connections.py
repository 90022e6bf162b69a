"""Connections: how many there may be, how long each may take, and which one goes when there are too many.

Uvicorn bounds neither the number of connections nor the time of a request or of reading an answer. So a client that
opens sockets and says nothing would keep everybody else out, with or without a key.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h11
from sinkrt.errors import UsageError, problem
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from sinkexport.serve.errors import ApiError
from sinkexport.serve.settings import Limits

LINGER_S = 2.0
"""How long a connection is read after its answer, so that a client that still sends gets to see the answer."""

ACCEPT_BATCH = 4
"""Connections accepted at a time: those accepted and not yet counted are few."""

SPARE_CONNECTIONS = 16
"""Connections above the limit that are still answered, with 503."""

SPARE_FILES = 40
"""File descriptors left for other things: files, pipes of a worker, and sockets that are accepted and not counted."""

logger = logging.getLogger("sinkexport.serve")


class Phase(enum.IntEnum):
    """What a connection is at. Smaller numbers are closed first when there are too many; WORK is never closed."""

    HEADER = 0  # a request has not begun or its header is incomplete
    REST = 1  # answered before its body was read
    IDLE = 2  # between two requests
    BODY = 3
    WORK = 4  # the whole request is there


class ConnectionTable:
    """The connections of one server; one event loop uses it, so it needs no lock.

    files: file descriptors that may be opened; None for no limit.

    Raises: UsageError if there are too few for one connection.
    """

    def __init__(self, limits: Limits, files: int | None) -> None:
        self.limits = limits
        wanted = limits.max_connections
        room = wanted if files is None else min(wanted, files - SPARE_FILES - SPARE_CONNECTIONS)
        if room < 1:
            raise UsageError(
                problem(
                    "open files",
                    received=f"room for {max(0, files or 0)} more",
                    expected=f"at least {SPARE_FILES + SPARE_CONNECTIONS + 1}",
                    fix="raise 'ulimit -n'",
                )
            )
        if room < wanted:
            logger.warning(
                "connections: %d instead of %d, as no more files may be open; raise 'ulimit -n'", room, wanted
            )
        self.max_connections = room
        self._open: dict[Connection, None] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Connection]:
        return iter(list(self._open))

    def enter(self, connection: Connection) -> bool:
        """Count a new connection. Returns False if there is no room to serve it, only to say so."""
        self._open[connection] = None
        if len(self._open) <= self.max_connections:
            return True
        candidates = [other for other in self._open if other.phase < Phase.WORK and other is not connection]
        if candidates:
            logger.warning("too many connections: one that was silent is closed")
            self._drop(min(candidates, key=lambda other: other.phase))  # the oldest of its phase
            return True
        if len(self._open) > self.max_connections + SPARE_CONNECTIONS:
            self._drop(connection)
        logger.warning("too many connections, all of them at work: a new one is turned away")
        return False

    def leave(self, connection: Connection) -> None:
        """Forget a connection that is closed."""
        self._open.pop(connection, None)

    def drop_all(self) -> None:
        """Close what is left when the server ends."""
        for connection in self:
            self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        self.leave(connection)
        connection.transport.abort()


class Connection(H11Protocol):
    """One connection, with a deadline for every phase except WORK, and one for a client that does not read."""

    def __init__(self, *arguments: Any, table: ConnectionTable, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._table = table
        self.phase = Phase.HEADER
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._refused = False

    # --- what asyncio and uvicorn call ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count it and wait for a header."""
        super().connection_made(transport)
        # asyncio does so for its own sockets only: without it, each answer waits 40 ms for an acknowledgement.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self._table.enter(self):
            self.app = _no_room
        self._set_deadline(self._table.limits.header_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._table.leave(self)
        for timer in (self._deadline, self._stalled):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes; what comes after a refusal is dropped."""
        if self._refused:
            return
        super().data_received(data)
        self._see()

    def on_response_complete(self) -> None:
        """Go on with the next request."""
        super().on_response_complete()
        self._unset_keepalive_if_required()  # `_see` has a deadline that dripped bytes do not move
        if self.transport.is_closing():  # it closes once its answer is read, if ever
            self._set_deadline(self._table.limits.stall_s)
        else:
            self._see()

    def pause_writing(self) -> None:
        """Give a client that does not read a last while."""
        super().pause_writing()
        if self._stalled is None:  # the decode loop ends its answer after half of this, and counts it as stalled
            self._stalled = self.loop.call_later(2 * self._table.limits.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's words are for its own form of errors
        """Answer what is no HTTP, in OpenAI's form; called while the parser's error is handled."""
        if getattr(sys.exc_info()[1], "error_status_hint", 400) == 431:
            self._refuse(ApiError(431, "request header: received more than expected, at most 16 KiB"))
        else:
            self._refuse(
                ApiError(
                    400,
                    "request: received what is no HTTP/1.1 request, expected a method, a path, "
                    "one Host and a body as long as announced",
                )
            )

    def shutdown(self) -> None:
        """Close what is not at work; also when a refusal has ended the connection's state machine already."""
        try:
            super().shutdown()
        except h11.LocalProtocolError:
            self.transport.close()

    # --- deadlines ---

    def _see(self) -> None:
        """Set the phase's deadline, if the phase has changed."""
        if self._refused or self.transport.is_closing():
            return
        phase, limits = self._phase_now(), self._table.limits
        if phase is self.phase:
            return
        self.phase = phase
        # The application's own deadline for the body goes first: its answer says why.
        seconds = {
            Phase.HEADER: limits.header_s,
            Phase.REST: LINGER_S,
            Phase.IDLE: limits.keep_alive_s,
            Phase.BODY: limits.body_s + LINGER_S,
        }.get(phase)
        self._set_deadline(seconds)

    def _phase_now(self) -> Phase:
        theirs = self.conn.their_state
        if theirs is h11.IDLE:
            return Phase.HEADER if self.conn.trailing_data[0] else Phase.IDLE
        if theirs is not h11.SEND_BODY:
            return Phase.WORK
        return Phase.REST if self.cycle is not None and self.cycle.response_complete else Phase.BODY

    def _set_deadline(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        if self.phase is Phase.HEADER and self.conn.trailing_data[0] and not self._refused:
            seconds = self._table.limits.header_s
            self._refuse(ApiError(408, f"the request's header did not arrive within {seconds:.0f} s"))
        else:
            self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        """Answer without the application, and close."""
        self._refused = True
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:  # the application must not answer as well
            cycle.disconnected = True
            cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # too late: an answer is under way or done
            self.transport.abort()
            return
        response = error.response()
        headers = [*response.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=error.status, headers=headers),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.write_eof()  # and read on: closing with bytes unread would take the answer away from the client
        self.flow.resume_reading()
        self._set_deadline(LINGER_S)


async def _no_room(scope: Scope, receive: Receive, send: Send) -> None:
    """The application of connections above the limit."""
    response = ApiError(503, "too many connections; try again soon").response()
    response.headers["Connection"] = "close"
    await response(scope, receive, send)


def free_files() -> int | None:
    """File descriptors that this process may still open; None for no limit, or if the system has none."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    return limit - len(list(Path("/dev/fd").iterdir()))
