"""Which conversation a request belongs to, and what its stream still has to take.

There are two ways to talk. Plain: every request brings all messages. If they begin with exactly the ids that an idle
conversation's stream has taken, the request goes on there and only the rest is fed. By name: the stream goes on
forever, and a request brings only what is new. All of this runs in the decode loop's thread, which owns the scheduler.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import numpy.typing as npt
from sinkrt.answer import AnswerParams
from sinkrt.sampler import SamplingParams
from sinkrt.scheduler import Scheduler

from sinkexport.serve.errors import ApiError
from sinkexport.serve.settings import Limits


class BegunError(Exception):
    """A named conversation has begun, or was forgotten, since its prompt was rendered: render it anew."""


@dataclasses.dataclass(frozen=True)
class Work:
    """A request as the decode loop takes it.

    ids: int64 [N], of the whole prompt. name: of the conversation; None for a plain request.
    new: whether the prompt begins a named conversation.
    """

    ids: npt.NDArray[np.int64]
    sampling: SamplingParams
    params: AnswerParams
    name: str | None = None
    new: bool = True


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where a request went.

    key: the scheduler's name of the conversation. reused: tokens of the prompt that its stream had taken already.
    """

    key: str
    reused: int


class Conversations:
    """Finds conversations for requests. Holds a counter and no other state: the scheduler has that."""

    def __init__(self, scheduler: Scheduler, limits: Limits) -> None:
        self._scheduler = scheduler
        self._limits = limits
        self._numbers = itertools.count(1)

    def begun(self, name: str) -> bool:
        """Whether a named conversation goes on with the next request.

        Raises: ApiError if it is at work on another.
        """
        key = named(name)
        if key not in self._scheduler:
            return False
        if self._scheduler.is_at_work(key):
            raise ApiError(
                409,
                f"conversation '{name}' is at work on another request; wait for its answer",
                param="conversation",
                code="conversation_busy",
            )
        return bool(self._scheduler.position(key) or self._scheduler.num_pending(key))

    def submit(self, work: Work) -> Placed:
        """Queue a request.

        Raises: UsageError for ids that are not the model's, or if no conversation can be forgotten for a new one;
        ApiError if the named conversation is at work; BegunError.
        """
        placed = self._plain(work) if work.name is None else self._named(work.name, work)
        ids = work.ids[placed.reused :]
        self._scheduler.submit(placed.key, ids, work.sampling, work.params, lasting=work.name is not None)
        return placed

    def delete(self, name: str) -> None:
        """Forget a named conversation.

        Raises: ApiError if it is unknown or at work.
        """
        if named(name) not in self._scheduler:
            raise ApiError(
                404, f"conversation '{name}' does not exist", param="conversation", code="conversation_not_found"
            )
        self.begun(name)
        self._scheduler.forget(named(name))

    def cancel(self, key: str) -> None:
        """Stop a conversation's work. A named one takes the rest of its prompt with the next request."""
        if key in self._scheduler:
            self._scheduler.cancel(key, keep_prompt=is_named(key))

    def _plain(self, work: Work) -> Placed:
        key = self._scheduler.find_start(work.ids)
        if key is not None:
            return Placed(key, self._scheduler.position(key))
        return Placed(f"plain:{next(self._numbers)}", 0)

    def _named(self, name: str, work: Work) -> Placed:
        if self.begun(name) == work.new:
            raise BegunError
        key, limit = named(name), self._limits.max_prompt_tokens
        left = self._scheduler.num_pending(key) if key in self._scheduler else 0
        if left + work.ids.size > limit:
            raise ApiError(
                400,
                f"prompt and what was left of the last one: received {left + work.ids.size} tokens, "
                f"expected at most {limit}",
                code="context_length_exceeded",
            )
        return Placed(key, 0)


def named(name: str) -> str:
    """The scheduler's name of a named conversation."""
    return f"named:{name}"


def is_named(key: str) -> bool:
    """Whether the scheduler's name is that of a named conversation."""
    return key.startswith("named:")
