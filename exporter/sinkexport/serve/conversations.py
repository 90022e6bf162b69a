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
from sinkrt.errors import UsageError
from sinkrt.sampler import SamplingParams
from sinkrt.scheduler import Scheduler

from sinkexport.serve.errors import ApiError
from sinkexport.serve.settings import Limits


class BegunError(Exception):
    """A named conversation has begun, or was forgotten, since its prompt was rendered: render it anew."""


@dataclasses.dataclass(frozen=True)
class Work:
    """A request as the decode loop takes it.

    ids: int64 [N], of the whole prompt. samplings: of each of its answers. name: of the conversation; None for a plain
    request. new: whether the prompt begins a named conversation. owner: name of the key that the request came with.
    opening: number of first ids that other conversations of the same application begin with too.
    """

    ids: npt.NDArray[np.int64]
    samplings: tuple[SamplingParams, ...]
    params: AnswerParams
    name: str | None = None
    new: bool = True
    owner: str = ""
    opening: int = 0


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where a request went.

    keys: the scheduler's names of the conversations, one for each answer. reused: tokens of the prompt that the first
    one's stream had taken already.
    """

    keys: tuple[str, ...]
    reused: int


class Conversations:
    """Finds conversations for requests. Holds a counter and no other state: the scheduler has that."""

    def __init__(self, scheduler: Scheduler, limits: Limits) -> None:
        self._scheduler = scheduler
        self._limits = limits
        self._numbers = itertools.count(1)

    def begun(self, owner: str, name: str) -> bool:
        """Whether a named conversation goes on with the next request.

        Raises: ApiError if it is at work on another.
        """
        key = named(owner, name)
        if not self._recalled(key):
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
        key, reused = self._plain(work) if work.name is None else self._named(work.name, work)
        first, *others = work.samplings
        lasting = work.name is not None
        is_new = key not in self._scheduler
        self._scheduler.submit(
            key, work.ids[reused:], first, work.params, lasting=lasting, owner=work.owner, opening=work.opening
        )
        if is_new:
            reused = self._scheduler.position(key)
        keys = [key]
        try:
            for sampling in others:
                sibling = self._new(work.owner)
                if self._scheduler.num_pending(key):
                    self._scheduler.submit_sibling(key, sibling, work.ids, sampling, work.params)
                else:  # its stream has taken the whole prompt before
                    self._scheduler.submit(sibling, work.ids, sampling, work.params, owner=work.owner)
                keys.append(sibling)
        except Exception:
            for placed in keys:
                self._scheduler.cancel(placed)
            raise
        return Placed(tuple(keys), reused)

    def delete(self, owner: str, name: str) -> None:
        """Forget a named conversation.

        Raises: ApiError if it is unknown or at work.
        """
        key = named(owner, name)
        if not self._scheduler.is_kept(key):
            raise _unknown(name)
        if key in self._scheduler:
            self.begun(owner, name)
        self._scheduler.delete(key)

    def position(self, owner: str, name: str) -> tuple[int, bool]:
        """Tokens that a named conversation's stream has taken, and whether it is at work.

        Raises: ApiError if it is unknown.
        """
        key = self._existing(owner, name)
        return self._scheduler.position(key), self._scheduler.is_at_work(key)

    def _existing(self, owner: str, name: str) -> str:
        """The scheduler's name of a named conversation. Raises: ApiError if there is none."""
        key = named(owner, name)
        if not self._recalled(key):
            raise _unknown(name)
        return key

    def _recalled(self, key: str) -> bool:
        """Whether there is a conversation, which is taken up from the disk if need be.

        Raises: ApiError if there is no room for it.
        """
        try:
            return self._scheduler.recall(key)
        except UsageError as error:
            raise ApiError(503, str(error), code="no_room") from error

    def cancel(self, key: str) -> None:
        """Stop a conversation's work. A named one takes the rest of its prompt with the next request."""
        if key in self._scheduler:
            self._scheduler.cancel(key, keep_prompt=is_named(key))

    def _plain(self, work: Work) -> tuple[str, int]:
        key = self._scheduler.find_start(work.ids, plain(work.owner))
        if key is None or self._scheduler.position(key) < self._scheduler.kept_start(work.owner, work.ids):
            return self._new(work.owner), 0
        return key, self._scheduler.position(key)

    def _named(self, name: str, work: Work) -> tuple[str, int]:
        if self.begun(work.owner, name) == work.new:
            raise BegunError
        key, limit = named(work.owner, name), self._limits.max_prompt_tokens
        left = self._scheduler.num_pending(key) if key in self._scheduler else 0
        if left + work.ids.size > limit:
            raise ApiError(
                400,
                f"prompt and what was left of the last one: received {left + work.ids.size} tokens, "
                f"expected at most {limit}",
                code="context_length_exceeded",
            )
        return key, 0

    def _new(self, owner: str) -> str:
        return f"{plain(owner)}{next(self._numbers)}"


def _unknown(name: str) -> ApiError:
    return ApiError(404, f"conversation '{name}' does not exist", param="conversation", code="conversation_not_found")


def named(owner: str, name: str) -> str:
    """The scheduler's name of a named conversation: each key has its own."""
    return f"named:{owner}/{name}" if owner else f"named:{name}"


def plain(owner: str) -> str:
    """Beginning of the scheduler's names of plain conversations: what one key has sent, no other one can find out."""
    return f"plain:{owner}/"


def is_named(key: str) -> bool:
    """Whether the scheduler's name is that of a named conversation."""
    return key.startswith("named:")
