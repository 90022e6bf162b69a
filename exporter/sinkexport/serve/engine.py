"""The one thread that owns the session: takes requests from any thread, runs the scheduler, hands out its events."""

from __future__ import annotations

import dataclasses
import hashlib
import queue
import secrets
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from sinkrt import Session, UsageError
from sinkrt.answer import AnswerParams
from sinkrt.sampler import SamplingParams
from sinkrt.scheduler import Event, Load, Scheduler

Ids = npt.NDArray[np.int64]
IDLE_WAIT_S = 0.5


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and what to do with its answer.

    ids: int64 [N], the whole prompt of a conversation that begins. next_ids: what to feed instead if the conversation
    of this name has begun already; only with a name. conversation: its name, or None for a request that brings its
    whole history.
    """

    ids: Ids
    sampling: SamplingParams
    params: AnswerParams
    conversation: str | None = None
    next_ids: Ids | None = None


@dataclasses.dataclass(frozen=True)
class Accepted:
    """A request that is under way.

    new: whether its stream began with it. reused_tokens: of the prompt, in the stream already.
    """

    conversation: str
    new: bool
    reused_tokens: int


@dataclasses.dataclass(frozen=True)
class Refused:
    """A request that is not taken. status: for HTTP. code: one word for programs."""

    status: int
    code: str
    message: str


Message = Accepted | Refused | Event
Deliver = Callable[[Message], None]
"""Called in the engine's thread; must return at once."""


@dataclasses.dataclass
class _History:
    """What a conversation's stream has taken: how many ids, and their SHA-256 so far."""

    count: int = 0
    digest: hashlib._Hash = dataclasses.field(default_factory=hashlib.sha256)

    def extend(self, ids: Ids) -> None:
        self.count += ids.size
        self.digest.update(np.ascontiguousarray(ids, dtype=np.int64).tobytes())


class Engine:
    """Runs a scheduler on `session` in a thread of its own.

    max_waiting: conversations that may wait for a stream, beyond those that have one. max_conversations: kept at all.

    A request that brings its whole history goes on in the stream that took exactly its beginning, if there is one:
    only what is new is fed. That is what feeding all of it would give, for the ids are the same.
    """

    def __init__(self, session: Session, *, max_waiting: int, max_conversations: int) -> None:
        self._scheduler = Scheduler(session, max_conversations=max_conversations)
        self._batch, self._max_waiting = session.batch, max_waiting
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._deliver: dict[str, Deliver] = {}  # by conversation at work
        self._histories: dict[str, _History] = {}
        self._named: dict[str, str] = {}  # the callers' names -> the scheduler's
        self._load = self._scheduler.load
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="sinkexport-engine", daemon=True)

    @property
    def load(self) -> Load:
        """How busy the scheduler was after its last step."""
        return self._load

    @property
    def failure(self) -> str | None:
        """Why the engine has ended, if it has."""
        if self._failure is None and not self._thread.is_alive():
            return "not running"
        return self._failure

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the step that is under way; answers that go on are refused as if the engine had failed."""
        self._commands.put(None)
        self._thread.join()

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Queue a request. `deliver` gets `Accepted` or `Refused` first, then events up to the one that ends it."""
        self._commands.put(lambda: self._submit(request, deliver))
        if self.failure is not None:
            deliver(_FAILED)

    def cancel(self, conversation: str) -> None:
        """Stop the answer of a conversation, by the name in `Accepted`; if it is over already, nothing happens."""
        self._commands.put(lambda: self._cancel(conversation))

    def forget(self, name: str, done: Callable[[bool], None]) -> None:
        """Forget a conversation by its callers' name; `done` is told whether there was one."""
        self._commands.put(lambda: done(self._forget(name)))

    # --- in the engine's thread ---

    def _run(self) -> None:
        try:
            while self._obey():
                for event in self._scheduler.step():
                    self._dispatch(event)
                self._load = self._scheduler.load
        except Exception as error:  # a bug, or no memory: say so to everybody instead of leaving them waiting
            self._failure = f"{type(error).__name__}: {error}"
        else:
            self._failure = "stopped"
        for deliver in self._deliver.values():
            deliver(_FAILED)

    def _obey(self) -> bool:
        """Carry out all commands that are there, waiting for one while there is nothing else to do. False: stop."""
        while True:
            try:
                command = self._commands.get(block=not self._scheduler.has_work, timeout=IDLE_WAIT_S)
            except queue.Empty:
                if self._scheduler.has_work:
                    return True
                continue
            if command is None:
                return False
            command()
            self._load = self._scheduler.load

    def _submit(self, request: Request, deliver: Deliver) -> None:
        load = self._scheduler.load
        if load.running + load.waiting >= self._batch + self._max_waiting:
            deliver(Refused(429, "overloaded", f"{self._max_waiting} conversations are waiting already; try again"))
            return
        self._clean_up()
        name, ids, reused = self._place(request)
        if name in self._deliver:
            deliver(Refused(409, "conversation_busy", f"conversation '{request.conversation}' is answering already"))
            return
        try:
            self._scheduler.submit(name, ids, request.sampling, request.params)
        except UsageError as error:
            deliver(Refused(429 if "at work" in str(error) else 400, "refused", str(error)))
            return
        new = self._histories.setdefault(name, _History()).count == 0
        if request.conversation is not None:
            self._named[request.conversation] = name
        self._deliver[name] = deliver
        deliver(Accepted(name, new, reused))

    def _place(self, request: Request) -> tuple[str, Ids, int]:
        """Which conversation takes a request, what to feed to it, and how much of the prompt is there already."""
        if request.conversation is not None:
            known = self._named.get(request.conversation)
            if known is not None and request.next_ids is not None:
                return known, request.next_ids, 0
            return secrets.token_hex(8), request.ids, 0
        named = set(self._named.values())
        digest, done = hashlib.sha256(), 0
        best: tuple[str, int] | None = None
        # By length, so that one pass over the prompt's ids checks them all.
        for name, history in sorted(self._histories.items(), key=lambda item: item[1].count):
            if not history.count < request.ids.size:  # at least one id must be left to feed
                break
            digest.update(request.ids[done : history.count].tobytes())
            done = history.count
            if name not in named and name not in self._deliver and digest.digest() == history.digest.digest():
                best = name, done
        if best is None:
            return secrets.token_hex(8), request.ids, 0
        return best[0], request.ids[best[1] :], best[1]

    def _dispatch(self, event: Event) -> None:
        history = self._histories[event.conversation]
        history.extend(np.asarray(event.tokens, dtype=np.int64))
        deliver = self._deliver[event.conversation]
        if event.finish_reason is not None:
            del self._deliver[event.conversation]
        deliver(event)

    def _cancel(self, name: str) -> None:
        if name in self._deliver and (event := self._scheduler.cancel(name)) is not None:
            self._dispatch(event)

    def _forget(self, name: str) -> bool:
        known = self._named.get(name)
        if known is None or known not in self._scheduler:
            return False
        self._cancel(known)
        self._scheduler.forget(known)
        self._clean_up()
        return True

    def _clean_up(self) -> None:
        """Let go of what the scheduler has forgotten."""
        for name in [name for name in self._histories if name not in self._scheduler]:
            del self._histories[name]
        for name in [name for name, known in self._named.items() if known not in self._scheduler]:
            del self._named[name]


_FAILED = Refused(503, "engine_failed", "the engine has stopped; see /health")


