"""Stream slots: a session's B streams and who has them, the conversations that wait for one, and the parked ones.

A stream slot is a stream's index in the batch; "slot" alone is an index in the window ring.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable

from sinkrt.conversation import Conversation
from sinkrt.errors import SinkError
from sinkrt.graph_runner import StreamCopy
from sinkrt.session import Session


class StreamSlots:
    """The streams of `session` and who has them.

    slice_tokens: how long a conversation keeps its stream while others wait.
    max_parked_bytes: most memory of parked streams, but for one more while two conversations take turns.
    forget: called with an idle conversation that must make room; it must `leave`.
    """

    def __init__(
        self, session: Session, slice_tokens: int, max_parked_bytes: int | None, forget: Callable[[Conversation], None]
    ) -> None:
        self._session = session
        self._slice_tokens = slice_tokens
        self._max_parked = None if max_parked_bytes is None else max_parked_bytes // stream_bytes(session)
        self._forget = forget
        self._owners: list[Conversation | None] = [None] * session.batch  # by stream
        self._waiting: collections.deque[Conversation] = collections.deque()
        self._num_parked = 0

    @property
    def num_waiting(self) -> int:
        """Conversations that could go on if they had a stream."""
        return len(self._waiting)

    @property
    def num_parked(self) -> int:
        """Conversations whose stream is copied out."""
        return self._num_parked

    @property
    def owners(self) -> list[Conversation]:
        """Conversations in a stream, in the order of the streams."""
        return [owner for owner in self._owners if owner is not None]

    def enter(self, conversation: Conversation) -> None:
        """Let a conversation wait for a stream if it needs one."""
        if conversation.stream is None and conversation.is_ready and conversation not in self._waiting:
            self._waiting.append(conversation)

    def stop_waiting(self, conversation: Conversation) -> None:
        """Take a conversation out of the queue: it has no work any more, or may not go on with it."""
        if conversation in self._waiting:
            self._waiting.remove(conversation)

    def park(self, conversation: Conversation, copy: StreamCopy) -> bool:
        """Give a conversation without a stream a copied one, if there is memory for that; returns whether."""
        if self._max_parked is not None and self._num_parked >= self._max_parked:
            return False
        conversation.copy = copy
        self._num_parked += 1
        return True

    def park_somehow(self, conversation: Conversation, copy: StreamCopy, by_age: Iterable[Conversation]) -> bool:
        """Do what `park` does, and forget idle ones that are parked until there is memory.

        by_age: all conversations, those to be forgotten first at the front.
        """
        for idle in [c for c in by_age if c.copy is not None and not c.has_work]:
            if self.park(conversation, copy):
                return True
            self._forget(idle)
        return self.park(conversation, copy)

    def leave(self, conversation: Conversation) -> None:
        """Forget all that its stream holds."""
        self.stop_waiting(conversation)
        if conversation.stream is not None:
            self._owners[conversation.stream] = None
            conversation.stream = None
        if conversation.copy is not None:
            conversation.copy = None
            self._num_parked -= 1

    def assign(self, by_age: Iterable[Conversation]) -> None:
        """Give those that wait their streams, first come, first served, as far as there are any.

        by_age: all conversations, those to be forgotten first at the front.
        """
        while self._waiting:
            newcomer = self._waiting[0]
            stream = self._free_stream(newcomer, list(by_age))
            if stream is None:
                return
            self._waiting.popleft()
            if newcomer.copy is None:
                self._session.reset([stream])
            else:
                self._session.place_stream(stream, newcomer.copy)
                newcomer.copy = None
                self._num_parked -= 1
            newcomer.stream, newcomer.placed_tokens = stream, 0
            self._owners[stream] = newcomer

    def _free_stream(self, newcomer: Conversation, by_age: list[Conversation]) -> int | None:
        """Find a stream that nobody has, or whose owner has nothing to do or has had its share."""
        for stream, owner in enumerate(self._owners):
            if owner is None:
                return stream
        resting = [c for c in by_age if c.stream is not None and not c.is_ready]
        resting.sort(key=lambda c: c.has_work)  # stable; those with paused work last
        spent = [c for c in self.owners if c.placed_tokens >= self._slice_tokens]
        # Of those at rest the least recently active; of those at work the one that has had the most.
        owner = resting[0] if resting else max(spent, key=lambda c: c.placed_tokens, default=None)
        return None if owner is None else self._vacate(owner, newcomer, by_age)

    def _vacate(self, owner: Conversation, newcomer: Conversation, by_age: list[Conversation]) -> int | None:
        """Park the owner of a stream, or forget someone idle if there is no memory for that."""
        stream = owner.the_stream
        if self._max_parked is not None and self._num_parked - (newcomer.copy is not None) >= self._max_parked:
            idle = [c for c in by_age if not c.has_work and (c.copy is not None or c is owner)]
            if not idle:
                return None
            self._forget(idle[0])
            if idle[0] is owner:
                return stream
        if owner.history.count:  # else there is nothing to keep
            try:
                owner.copy = self._session.copy_stream(stream)
            except SinkError:  # an error has cut it short: one at work shows that itself, when it is fed next
                if owner.has_work:
                    return None
                self._forget(owner)
                return stream
            self._num_parked += 1
        owner.stream = None
        self._owners[stream] = None
        self.enter(owner)
        return stream


def stream_bytes(session: Session) -> int:
    """Bytes of one parked stream: states, logits and recent ids."""
    states = sum(state.nbytes for state in session.manifest.states)
    return (states + session.logits.nbytes) // session.batch + 8 * session.capacity
