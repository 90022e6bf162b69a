"""One conversation of a `Scheduler`: its stream, the ids that it has taken, and its work."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import numpy.typing as npt

from sinkrt.answer import Answer
from sinkrt.graph_runner import StreamCopy

DIGEST_BYTES = 16
NO_IDS = np.zeros(0, dtype=np.int64)


class IdHistory:
    """Record of the ids that a stream has taken, in constant memory: their number, and a hash over them in order."""

    def __init__(self) -> None:
        self._count = 0
        self._hash = _hash()

    @property
    def count(self) -> int:
        """Ids taken."""
        return self._count

    @classmethod
    def counted(cls, count: int) -> IdHistory:
        """A record of `count` ids that nobody knows any more: its digest is that of no ids."""
        history = cls()
        history._count = count
        return history

    def take(self, ids: npt.NDArray[np.int64]) -> None:
        """Add ids, int64 [n]."""
        self._hash.update(ids.astype("<i8").tobytes())
        self._count += int(ids.size)

    def copy(self) -> IdHistory:
        """A record of its own that goes on from here."""
        other = IdHistory()
        other._count, other._hash = self._count, self._hash.copy()
        return other

    def digest(self) -> bytes:
        """16 bytes that no other ids give: 128 bits of BLAKE2b, so that a match needs no second look."""
        return self._hash.digest()


def starts(ids: npt.NDArray[np.int64], counts: list[int]) -> dict[int, bytes]:
    """Digest of the first `count` ids for each of `counts`, as an `IdHistory` that took them gives it; one pass.

    ids: int64 [N]. Counts above N are left out.
    """
    history, found = IdHistory(), {}
    for count in sorted(set(counts)):
        if count > ids.size:
            break
        history.take(ids[history.count : count])
        found[count] = history.digest()
    return found


def _hash() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=DIGEST_BYTES)


@dataclasses.dataclass(eq=False)
class Conversation:
    """State of one conversation.

    stream: where it is now, or None. copy: what it was when it was parked. pending: int64 [N], ids to feed, from `fed`
    on. answer: in progress, or None. lasting: forgotten only if no other can be. paused: has work that must not go on.
    announced: whether an event has reported that it has a stream. placed_tokens: fed since it has had its stream.
    followed: whether the answer knows what it follows. goes_on: whether that is the answer's own text, cut short.
    leader: the conversation that is fed the same prompt for this one too, its sibling.
    owner: whose beginnings of prompts it shares. boundaries: numbers of ids, ascending, after which its stream is worth
    keeping for others. saved_at: ids that its stream had taken when it was saved.
    """

    name: str
    lasting: bool = False
    stream: int | None = None
    copy: StreamCopy | None = None
    pending: npt.NDArray[np.int64] = dataclasses.field(default_factory=lambda: NO_IDS)
    fed: int = 0
    answer: Answer | None = None
    paused: bool = False
    announced: bool = False
    placed_tokens: int = 0
    followed: bool = False
    goes_on: bool = False
    history: IdHistory = dataclasses.field(default_factory=IdHistory)
    leader: Conversation | None = None
    siblings: list[Conversation] = dataclasses.field(default_factory=list)
    owner: str = ""
    boundaries: list[int] = dataclasses.field(default_factory=list)
    saved_at: int = 0

    @property
    def has_work(self) -> bool:
        """Whether a request is not done yet."""
        return self.answer is not None

    @property
    def is_ready(self) -> bool:
        """Whether the next step may take part of its work."""
        return self.has_work and not self.paused and self.leader is None

    @property
    def num_pending(self) -> int:
        """Ids of the prompt that are not fed yet."""
        return int(self.pending.size) - self.fed

    @property
    def num_in_one_go(self) -> int:
        """Ids of the prompt that may be fed in one go: up to where its stream is to be kept, or all."""
        ahead = [boundary - self.history.count for boundary in self.boundaries if boundary > self.history.count]
        return min([self.num_pending, *ahead])

    @property
    def the_answer(self) -> Answer:
        """The answer in progress.

        Raises: RuntimeError if there is none.
        """
        if self.answer is None:
            raise RuntimeError(f"conversation '{self.name}' has no answer in progress")
        return self.answer

    @property
    def the_stream(self) -> int:
        """The stream that it is in.

        Raises: RuntimeError if it is in none.
        """
        if self.stream is None:
            raise RuntimeError(f"conversation '{self.name}' is in no stream")
        return self.stream

    def follow(self, leader: Conversation) -> None:
        """Wait until `leader` has been fed the prompt of both."""
        self.leader = leader
        leader.siblings.append(self)

    def end_siblings(self) -> list[Conversation]:
        """Let nobody follow any more, and follow nobody. Returns: those that did follow."""
        if self.leader is not None:
            self.leader.siblings.remove(self)
            self.leader = None
        free, self.siblings = self.siblings, []
        for sibling in free:
            sibling.leader = None
        return free

    def took(self, ids: npt.NDArray[np.int64]) -> None:
        """Count tokens that its stream has taken. ids: int64 [n]."""
        self.history.take(ids)
        self.placed_tokens += int(ids.size)
