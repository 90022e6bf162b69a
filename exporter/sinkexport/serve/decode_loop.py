"""The engine: one thread that owns the session and its scheduler. All others talk to it through a queue."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from sinkrt import Session
from sinkrt.scheduler import Event, Scheduler

from sinkexport.serve.conversations import Conversations, Placed, Work
from sinkexport.serve.errors import ApiError
from sinkexport.serve.metrics import Metrics, Totals
from sinkexport.serve.response_queue import HIGH, LOW, Outlet, Piece
from sinkexport.serve.settings import Limits

LOOK_S = 1.0
"""How often an engine without other work looks for clients that take no text."""

T = TypeVar("T")
Command = Callable[[], None]
logger = logging.getLogger("sinkexport.serve")


class Engine:
    """Runs the scheduler of `session`, which belongs to the engine from `start` on.

    If its thread dies, `failure` tells why, every request at work gets 503, and so does every later one.
    """

    def __init__(self, session: Session, limits: Limits, metrics: Metrics) -> None:
        self._session = session
        self._limits = limits
        self._metrics = metrics
        self._scheduler = Scheduler(
            session, max_conversations=limits.max_conversations, max_parked_bytes=limits.max_parked_bytes
        )
        self._conversations = Conversations(self._scheduler, limits)
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()  # None: stop
        self._outlets: dict[str, Outlet] = {}  # of requests at work, by the scheduler's name
        self._thread = threading.Thread(target=self._run, name="sinkexport-engine", daemon=True)
        self._failure: str | None = None
        self._lock = threading.Lock()  # guards what follows, and nothing that takes time
        self._closed = False
        self.totals = Totals()
        metrics.watch(lambda: self.totals)

    @property
    def failure(self) -> str | None:
        """Why the engine is down, in one line; None while it works."""
        return self._failure

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> None:
        """End the thread; requests at work get 503. Stopping twice is fine."""
        self.request_stop()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def request_stop(self) -> None:
        """As `stop`, without waiting for it."""
        self._inbox.put(None)

    async def begun(self, name: str) -> bool:
        """As `Conversations.begun`."""
        return await self._call(lambda: self._conversations.begun(name))

    async def delete(self, name: str) -> None:
        """As `Conversations.delete`."""
        await self._call(lambda: self._conversations.delete(name))

    async def submit(self, work: Work, outlet: Outlet) -> Placed:
        """Queue a request, whose pieces come out of `outlet`. Whoever awaits this calls `release` in the end.

        Raises: as `Conversations.submit`; ApiError 503 if the engine is down.
        """

        def begin() -> Placed:
            placed = self._conversations.submit(work)
            self._outlets[placed.key] = outlet
            self.totals.reused_tokens += placed.reused
            return placed

        return await self._call(begin)

    def release(self, outlet: Outlet) -> None:
        """The request is over for its client: cancel it if it is at work. Callable whatever became of `submit`."""
        self._post(lambda: self._release(outlet))

    def resume(self, outlet: Outlet) -> None:
        """The client has taken what was waiting for it."""
        self._post(lambda: self._resume(outlet))

    # --- into the thread ---

    def _post(self, command: Command) -> bool:
        with self._lock:
            if self._closed:
                return False
            self._inbox.put(command)
            return True

    async def _call(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises in the engine's thread."""
        future: Future[T] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():  # its caller has been cancelled
                return
            try:
                result = function()
            except Exception as error:  # the caller's to judge, not the engine's
                future.set_exception(error)
            else:
                future.set_result(result)

        if not self._post(command):
            raise ApiError(503, self._failure or "the server is stopping")
        return await asyncio.wrap_future(future)

    # --- the thread ---

    def _run(self) -> None:
        reason = "the server is stopping"
        try:
            while self._obey():
                if self._scheduler.has_work:
                    self._deliver(self._scheduler.step())
                self._give_up_on_stalled()
                self._update_totals()
        except BaseException as error:  # nobody else would hear of it
            logger.exception("the engine has failed")
            reason = self._failure = f"the engine has failed: {type(error).__name__}: {' '.join(str(error).split())}"
            self.totals.failed = True
        with self._lock:
            self._closed = True
        while not self._inbox.empty():  # commands that came too late: nobody must wait for them for ever
            command = self._inbox.get()
            try:
                if command is not None:
                    command()
            except Exception:  # after a failure the scheduler may be in any state
                logger.exception("a command failed after the engine")
        for key, outlet in list(self._outlets.items()):
            self._send({outlet.loop: [(outlet, Piece(error=ApiError(503, reason)))]})
            del self._outlets[key]

    def _obey(self) -> bool:
        """Carry out all commands; waits for one if there is nothing else to do. False: stop."""
        idle = not self._scheduler.has_work
        while True:
            try:
                command = self._inbox.get(block=idle, timeout=self._patience() if idle else None)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            idle = False

    def _patience(self) -> float | None:
        return LOOK_S if any(outlet.paused for outlet in self._outlets.values()) else None

    def _release(self, outlet: Outlet) -> None:
        for key, other in self._outlets.items():
            if other is outlet:
                del self._outlets[key]
                self._conversations.cancel(key)
                self._metrics.finished.labels("cancelled").inc()
                return

    def _resume(self, outlet: Outlet) -> None:
        for key, other in self._outlets.items():
            if other is outlet and outlet.paused and outlet.backlog <= LOW:
                outlet.paused = False
                self._scheduler.resume(key)

    def _deliver(self, events: list[Event]) -> None:
        batches: dict[asyncio.AbstractEventLoop, list[tuple[Outlet, Piece]]] = defaultdict(list)
        for event in events:
            outlet = self._outlets.get(event.conversation)
            if outlet is None:
                continue
            self._measure(event, outlet)
            if not event.text and event.finish_reason is None:
                continue
            if event.error is not None:
                logger.error("a request has failed: %s", event.error)
            error = None if event.error is None else ApiError(500, event.error, code="engine_error")
            position = self._scheduler.position(event.conversation) if event.conversation in self._scheduler else 0
            piece = Piece(event.text, event.finish_reason, error, False, event.answer_tokens, position)
            outlet.sent += 1
            batches[outlet.loop].append((outlet, piece))
            if event.finish_reason is not None:
                del self._outlets[event.conversation]
            elif outlet.backlog > HIGH and not outlet.paused:
                self._pause(event.conversation, outlet)
        self._send(batches)

    def _pause(self, key: str, outlet: Outlet) -> None:
        outlet.paused, outlet.paused_since = True, time.monotonic()
        self._scheduler.pause(key)
        self._resume(outlet)  # if everything has been taken in this very moment

    def _give_up_on_stalled(self) -> None:
        now = time.monotonic()
        for key, outlet in list(self._outlets.items()):
            if outlet.paused and now - outlet.paused_since > self._limits.stall_s:
                self._conversations.cancel(key)
                self._metrics.finished.labels("stalled").inc()
                del self._outlets[key]
                message = f"the client has taken no text for {self._limits.stall_s:.0f} s"
                self._send({outlet.loop: [(outlet, Piece(error=ApiError(408, message)))]})

    def _measure(self, event: Event, outlet: Outlet) -> None:
        now = time.perf_counter()
        if not outlet.has_stream:
            outlet.has_stream = True
            self._metrics.queue_s.observe(now - outlet.arrived)
        if event.answer_tokens and outlet.first_token is None:
            outlet.first_token = now
            self._metrics.first_token_s.observe(now - outlet.arrived)
        if event.finish_reason is not None:
            self._metrics.finished.labels(event.finish_reason).inc()
            if outlet.first_token is not None and event.answer_tokens > 1:
                self._metrics.output_token_s.observe((now - outlet.first_token) / (event.answer_tokens - 1))

    def _update_totals(self) -> None:
        load = self._scheduler.load
        totals = self.totals
        totals.running, totals.waiting, totals.parked = load.running, load.waiting, load.parked
        totals.conversations = load.conversations
        totals.prompt_tokens, totals.answer_tokens = self._scheduler.prompt_tokens, self._scheduler.answer_tokens

    @staticmethod
    def _send(batches: dict[asyncio.AbstractEventLoop, list[tuple[Outlet, Piece]]]) -> None:
        """One wake-up a loop, however many pieces."""

        def put(pieces: list[tuple[Outlet, Piece]]) -> None:
            for outlet, piece in pieces:
                outlet.queue.put_nowait(piece)

        for loop, pieces in batches.items():
            try:
                loop.call_soon_threadsafe(put, pieces)
            except RuntimeError:  # the loop is closed: nobody is left to read
                logger.debug("an answer came after its loop was closed")
