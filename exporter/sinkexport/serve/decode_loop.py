"""The decode loop: one thread that owns the session and its scheduler. All others talk to it through a queue."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from sinkrt import Session
from sinkrt.conversation_folder import ConversationFolder
from sinkrt.prefix_store import PrefixStore
from sinkrt.scheduler import Event, Scheduler

from sinkexport.serve.conversations import Conversations, Placed, Work
from sinkexport.serve.errors import ApiError
from sinkexport.serve.metrics import Metrics, Totals
from sinkexport.serve.response_queue import HIGH, LOW, Piece, ResponseQueue
from sinkexport.serve.settings import Limits

LOOK_S = 1.0
"""How often an idle loop looks for clients that take no text."""

STOP_S = 30.0
"""Seconds that the thread gets to end."""

T = TypeVar("T")
Command = Callable[[], None]
logger = logging.getLogger("sinkexport.serve")


class DecodeLoop:
    """Runs the scheduler of `session`, with `prefixes` and `folder`. All belong to the loop's thread from `start` on.

    If the thread dies, `failure` says why. Every request at work gets 503, and so does every later one.
    """

    def __init__(
        self,
        session: Session,
        limits: Limits,
        metrics: Metrics,
        prefixes: PrefixStore | None = None,
        folder: ConversationFolder | None = None,
    ) -> None:
        self._session = session
        self._limits = limits
        self._metrics = metrics
        self.scheduler = Scheduler(
            session,
            max_conversations=limits.max_conversations,
            max_parked_bytes=limits.max_parked_bytes,
            prefixes=prefixes,
            folder=folder,
            save_every=limits.save_every,
        )
        self._prefixes = prefixes
        self._conversations = Conversations(self.scheduler, limits)
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()  # None: stop
        self.responses: dict[str, ResponseQueue] = {}  # of requests at work, by the scheduler's name
        self._thread = threading.Thread(target=self._run, name="sinkexport-decode", daemon=True)
        self._failure: str | None = None
        self._lock = threading.Lock()  # guards `_closed`, and nothing that takes time
        self._closed = False
        self.totals = Totals()
        metrics.watch(lambda: self.totals)

    @property
    def failure(self) -> str | None:
        """Why the loop is down, in one line; None while it works."""
        return self._failure

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; requests at work get 503. Stopping twice is fine."""
        self.request_stop()
        if self._thread.is_alive():
            self._thread.join(STOP_S)

    def request_stop(self) -> None:
        """Ask the thread to end, without waiting for it."""
        self._inbox.put(None)

    async def begun(self, owner: str, name: str) -> bool:
        """See `Conversations.begun`."""
        return await self._call(lambda: self._conversations.begun(owner, name))

    async def position(self, owner: str, name: str) -> tuple[int, bool]:
        """See `Conversations.position`."""
        return await self._call(lambda: self._conversations.position(owner, name))

    async def delete(self, owner: str, name: str) -> None:
        """See `Conversations.delete`."""
        await self._call(lambda: self._conversations.delete(owner, name))

    async def submit(self, work: Work, responses: Sequence[ResponseQueue]) -> Placed:
        """Queue a request, whose answers' pieces come out of `responses`. Whoever awaits this calls `release` for each.

        Raises: as `Conversations.submit`; ApiError 503 if the loop is down.
        """

        def begin() -> Placed:
            placed = self._conversations.submit(work)
            self.responses.update(zip(placed.keys, responses, strict=True))
            self.totals.reused_tokens += placed.reused
            return placed

        return await self._call(begin)

    def release(self, responses: ResponseQueue) -> None:
        """End an answer for its client: cancel it if it is at work. Callable whatever became of `submit`."""
        self._post(lambda: self._release(responses))

    def resume(self, responses: ResponseQueue) -> None:
        """Go on with a paused answer: its client has taken what was waiting."""
        self._post(lambda: self._resume(responses))

    # --- into the thread ---

    def _post(self, command: Command) -> bool:
        with self._lock:
            if self._closed:
                return False
            self._inbox.put(command)
            return True

    async def _call(self, function: Callable[[], T]) -> T:
        """Run `function` in the loop's thread. Returns or raises what it does."""
        future: Future[T] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():  # its caller has been cancelled
                return
            try:
                result = function()
            except Exception as error:  # the caller's to judge, not the loop's
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
                if self.scheduler.has_work:
                    self._deliver(self.scheduler.step())
                self._give_up_on_stalled()
                self._update_totals()
        except BaseException as error:  # nobody else would hear of it
            logger.exception("the decode loop has failed")
            reason = f"the decode loop has failed: {type(error).__name__}: {' '.join(str(error).split())}"
            self._failure = reason
            self.totals.failed = True
        try:
            self.scheduler.close(save=self._failure is None)
        except Exception:
            logger.exception("conversations could not be saved")
        with self._lock:
            self._closed = True
        while not self._inbox.empty():  # commands that came too late: nobody must wait for them forever
            command = self._inbox.get()
            try:
                if command is not None:
                    command()
            except Exception:  # after a failure the scheduler may be in any state
                logger.exception("a command failed after the decode loop")
        for key, responses in list(self.responses.items()):
            self._send({responses.loop: [(responses, Piece(error=ApiError(503, reason)))]})
            del self.responses[key]

    def _obey(self) -> bool:
        """Carry out all commands; wait for one if there is nothing else to do. Returns False to stop."""
        idle = not self.scheduler.has_work
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
        return LOOK_S if any(responses.paused for responses in self.responses.values()) else None

    def _release(self, responses: ResponseQueue) -> None:
        for key, other in self.responses.items():
            if other is responses:
                self._end(key)
                self._conversations.cancel(key)
                self._metrics.finished.labels("cancelled").inc()
                return

    def _resume(self, responses: ResponseQueue) -> None:
        for key, other in self.responses.items():
            if other is responses and responses.paused and responses.backlog <= LOW:
                responses.paused = False
                self.scheduler.resume(key)

    def _deliver(self, events: list[Event]) -> None:
        batches: dict[asyncio.AbstractEventLoop, list[tuple[ResponseQueue, Piece]]] = defaultdict(list)
        for event in events:
            responses = self.responses.get(event.conversation)
            if responses is None:
                continue
            self._measure(event, responses)
            if not (event.text or event.logprobs) and event.finish_reason is None:
                continue
            if event.error is not None:
                logger.error("a request has failed: %s", event.error)
            error = None if event.error is None else ApiError(500, event.error, code="engine_error")
            position = self.scheduler.position(event.conversation) if event.conversation in self.scheduler else 0
            piece = Piece(
                event.text,
                event.finish_reason,
                error,
                answer_tokens=event.answer_tokens,
                position=position,
                choice=responses.choice,
                logprobs=event.logprobs,
            )
            responses.sent += 1
            batches[responses.loop].append((responses, piece))
            if event.finish_reason is not None:
                self._end(event.conversation)
            elif responses.backlog > HIGH and not responses.paused:
                self._pause(event.conversation, responses)
        self._send(batches)

    def _pause(self, key: str, responses: ResponseQueue) -> None:
        responses.paused, responses.paused_since = True, time.monotonic()
        self.scheduler.pause(key)
        self._resume(responses)  # if everything has been taken in this very moment

    def _give_up_on_stalled(self) -> None:
        now = time.monotonic()
        for key, responses in list(self.responses.items()):
            if responses.paused and now - responses.paused_since > self._limits.stall_s:
                self._conversations.cancel(key)
                self._metrics.finished.labels("stalled").inc()
                self._end(key)
                message = f"the client has taken no text for {self._limits.stall_s:.0f} s"
                self._send({responses.loop: [(responses, Piece(error=ApiError(408, message)))]})

    def _end(self, key: str) -> None:
        """Forget who an answer is for, and put its tokens on the account of the key that it was asked for with."""
        responses = self.responses.pop(key)
        if responses.owner:
            self._metrics.key_tokens.labels(responses.owner, "prompt").inc(responses.prompt_tokens)
            self._metrics.key_tokens.labels(responses.owner, "answer").inc(responses.answer_tokens)

    def _measure(self, event: Event, responses: ResponseQueue) -> None:
        now = time.perf_counter()
        responses.answer_tokens = event.answer_tokens
        if responses.choice == 0:  # the other answers share its prompt
            responses.prompt_tokens = event.prompt_tokens
        if not responses.has_stream:
            responses.has_stream = True
            self._metrics.queue_s.observe(now - responses.arrived)
        if event.answer_tokens and responses.first_token is None:
            responses.first_token = now
            self._metrics.first_token_s.observe(now - responses.arrived)
        if event.finish_reason is not None:
            self._metrics.finished.labels(event.finish_reason).inc()
            if responses.first_token is not None and event.answer_tokens > 1:
                self._metrics.output_token_s.observe((now - responses.first_token) / (event.answer_tokens - 1))

    def _update_totals(self) -> None:
        load = self.scheduler.load
        totals = self.totals
        totals.running, totals.waiting, totals.parked = load.running, load.waiting, load.parked
        totals.conversations = load.conversations
        if self._prefixes is not None:
            totals.prefixes, totals.prefix_bytes = len(self._prefixes), self._prefixes.num_bytes
        totals.prompt_tokens, totals.answer_tokens = self.scheduler.prompt_tokens, self.scheduler.answer_tokens

    @staticmethod
    def _send(batches: dict[asyncio.AbstractEventLoop, list[tuple[ResponseQueue, Piece]]]) -> None:
        """Hand pieces to their event loops: one wake-up for each loop, however many pieces."""

        def put(pieces: list[tuple[ResponseQueue, Piece]]) -> None:
            for responses, piece in pieces:
                responses.queue.put_nowait(piece)

        for loop, pieces in batches.items():
            try:
                loop.call_soon_threadsafe(put, pieces)
            except RuntimeError:  # the loop is closed: nobody is left to read
                logger.debug("an answer came after its loop was closed")
