"""What outlasts a conversation's place in a scheduler: beginnings of prompts, and the conversation itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sinkrt.conversation import Conversation, IdHistory
from sinkrt.conversation_folder import ConversationFolder
from sinkrt.errors import SinkError
from sinkrt.graph_runner import StreamCopy
from sinkrt.prefix_store import PrefixStore
from sinkrt.session import Session

SAVE_EVERY = 256
"""Tokens after which a conversation is saved again: a copy of a stream takes about as long as one."""


class Keeper:
    """Keeps streams of `session`: of beginnings in `prefixes`, of lasting conversations in `folder`; None: keeps none.

    save_every: tokens after which a conversation at work is saved again.
    """

    def __init__(
        self, session: Session, prefixes: PrefixStore | None, folder: ConversationFolder | None, save_every: int
    ) -> None:
        self._session, self._prefixes, self._folder = session, prefixes, folder
        self._save_every = save_every

    def longest(self, owner: str, ids: npt.NDArray[np.int64]) -> int:
        """Number of first ids that a new conversation of `owner` need not be fed. ids: int64 [N]."""
        return 0 if self._prefixes is None else self._prefixes.longest(owner, ids)

    def begin(
        self,
        conversation: Conversation,
        ids: npt.NDArray[np.int64],
        opening: int,
        park: Callable[[Conversation, StreamCopy], bool],
    ) -> npt.NDArray[np.int64]:
        """Give a new conversation the stream of a kept beginning, if there is one. Returns: the ids that are left.

        opening: see `Scheduler.submit`. park: gives it the stream, if there is memory.
        """
        if self._prefixes is None:
            return ids
        found = self._prefixes.find(conversation.owner, ids)  # first: a damaged one is dropped, and then kept anew
        conversation.boundaries = self._prefixes.boundaries(conversation.owner, ids, opening)
        if found is None or not park(conversation, found.copy):
            return ids
        conversation.history = found.history
        return ids[found.history.count :]

    def took(self, conversation: Conversation) -> None:
        """Keep what is worth it of a conversation whose stream has taken tokens and is whole."""
        count = conversation.history.count
        if self._prefixes is not None and count in conversation.boundaries:
            conversation.boundaries.remove(count)
            if (copy := self._whole(conversation.the_stream)) is not None:
                self._prefixes.keep(conversation.owner, conversation.history, copy)
        if count - conversation.saved_at >= self._save_every:
            self.save(conversation)

    def save(self, conversation: Conversation) -> None:
        """Save a lasting conversation whose stream, or the rest of whose prompt, is not what was saved."""
        rest = conversation.pending[conversation.fed :]
        count = conversation.history.count
        if self._folder is None or not conversation.lasting:
            return
        if not rest.size and count == conversation.saved_at and not self._folder.has_failed(conversation.name):
            return
        copy = conversation.copy if conversation.stream is None else self._whole(conversation.stream)
        if copy is None:
            return  # it has taken nothing, or its numbers are none
        self._folder.save(conversation.name, copy, rest.copy())
        conversation.saved_at = count

    def _whole(self, stream: int) -> StreamCopy | None:
        """A copy of a stream; None if its numbers are none, which shows as an error where it is used next."""
        try:
            copy = self._session.copy_stream(stream, used_rows=True)
        except SinkError:
            return None
        return copy if np.isfinite(copy.logits).all() else None

    def has(self, name: str) -> bool:
        """Whether a conversation was saved."""
        return self._folder is not None and name in self._folder

    def read(self, name: str) -> tuple[Conversation, StreamCopy] | None:
        """A saved conversation and its stream; None if there is none that can be used."""
        found = None if self._folder is None else self._folder.read(name)
        if found is None:
            return None
        copy, pending = found
        history = IdHistory.counted(copy.position)
        return Conversation(name, True, pending=pending, history=history, saved_at=copy.position), copy

    def remove(self, name: str) -> None:
        """Delete what was saved of a conversation."""
        if self._folder is not None:
            self._folder.remove(name)

    def close(self) -> None:
        """Wait until everything is on the disk."""
        if self._folder is not None:
            self._folder.close()
        if self._prefixes is not None:
            self._prefixes.close()
