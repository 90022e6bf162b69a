"""The conversations that a `Scheduler` remembers, by name and by age."""

from __future__ import annotations

import collections

import numpy as np
import numpy.typing as npt

from sinkrt.conversation import Conversation, starts
from sinkrt.errors import UsageError, problem


class ConversationTable:
    """Conversations by name; those that were active last come last.

    max_conversations: how many are remembered, >= 1.
    """

    def __init__(self, max_conversations: int) -> None:
        self._max_conversations = max_conversations
        self._by_name: collections.OrderedDict[str, Conversation] = collections.OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __len__(self) -> int:
        return len(self._by_name)

    def get(self, name: str) -> Conversation | None:
        """The conversation of that name, or None."""
        return self._by_name.get(name)

    def known(self, name: str) -> Conversation:
        """The conversation of that name.

        Raises: UsageError if there is none.
        """
        conversation = self._by_name.get(name)
        if conversation is None:
            raise UsageError(
                problem(
                    "conversation",
                    received=f"'{name}'",
                    expected="one that has begun and is kept",
                    fix="submit something to it first",
                )
            )
        return conversation

    def touch(self, conversation: Conversation) -> None:
        """Note that a conversation, new or known, is active now."""
        self._by_name[conversation.name] = conversation
        self._by_name.move_to_end(conversation.name)

    def remove(self, conversation: Conversation) -> None:
        """Forget a conversation."""
        del self._by_name[conversation.name]

    def by_age(self) -> list[Conversation]:
        """All conversations, the one to be forgotten first at the front."""
        return sorted(self._by_name.values(), key=lambda c: c.lasting)  # stable: the least recently active first

    def in_the_way(self) -> Conversation | None:
        """The conversation that must be forgotten before there is room for another; None if there is room.

        Raises: UsageError if all are at work.
        """
        if len(self._by_name) < self._max_conversations:
            return None
        idle = next((c for c in self.by_age() if not c.has_work), None)
        if idle is None:
            raise UsageError(
                problem(
                    "conversations",
                    received=f"{len(self._by_name)} at work",
                    expected=f"fewer than {self._max_conversations}",
                    fix="wait for one to end",
                )
            )
        return idle

    def find_start(self, ids: npt.NDArray[np.int64], prefix: str = "") -> Conversation | None:
        """The idle conversation that has taken exactly the longest start of `ids`, or None; no lasting one.

        ids: int64 [N]. prefix: begins the names of those that count.
        """
        candidates = [c for name, c in self._by_name.items() if name.startswith(prefix)]
        idle = [c for c in candidates if c.history.count and not (c.has_work or c.lasting)]
        digests = starts(ids, [c.history.count for c in idle])
        found = [c for c in idle if digests.get(c.history.count) == c.history.digest()]
        return max(found, key=lambda c: c.history.count) if found else None
