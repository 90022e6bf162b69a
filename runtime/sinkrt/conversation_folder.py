"""Conversations on the disk: they survive the end of the process, however it ends.

A file is named by the hash of the conversation's name, and replaced whole or not at all.
"""

from __future__ import annotations

import collections
import hashlib
import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sinkrt.contract import Manifest
from sinkrt.graph_runner import StreamCopy
from sinkrt.stream_folder import StreamFolder

NAME_BYTES = 16
MAX_WAITING = 4
"""Conversations that wait to be written, each as large as a stream; whoever saves one more waits."""

_NAME = re.compile(r"conversation-[0-9a-f]{32}\.safetensors")
logger = logging.getLogger("sinkrt")
Saved = tuple[StreamCopy, npt.NDArray[np.int64]]


class ConversationFolder:
    """Files of one bundle's conversations below `root`, written in a thread of its own, the newest state of each.

    max_bytes: of all files of this bundle, >= 1; the least recently saved or read ones go first.

    Raises: UsageError if the folder cannot be made or written, or another process uses it.
    """

    def __init__(self, root: Path, manifest: Manifest, max_bytes: int) -> None:
        self._files = StreamFolder(root, manifest, max_bytes, _NAME, "conversations")
        self._files.claim()
        self._changed = threading.Condition()  # guards all below
        self._waiting: collections.OrderedDict[str, Saved] = collections.OrderedDict()  # by conversation
        self._writing: str | None = None
        self._failed: set[str] = set()  # what is on the disk of them is not what was saved last
        self._closed = False
        self._writer = threading.Thread(target=self._write_all, name="sinkrt-conversations", daemon=True)
        self._writer.start()

    def __contains__(self, conversation: str) -> bool:
        with self._changed:
            return conversation in self._waiting or conversation == self._writing or _name(conversation) in self._files

    def read(self, conversation: str) -> Saved | None:
        """A conversation's stream and the ids that it has not been fed; None if it was not saved, or is damaged."""
        self._await(lambda: conversation != self._writing and conversation not in self._waiting)
        return self._files.read(_name(conversation))

    def has_failed(self, conversation: str) -> bool:
        """Whether a conversation could not be written the last time."""
        with self._changed:
            return conversation in self._failed

    def save(self, conversation: str, copy: StreamCopy, pending: npt.NDArray[np.int64]) -> None:
        """Write a conversation, soon: what is saved of it meanwhile takes the place of what waits."""
        self._await(lambda: conversation in self._waiting or len(self._waiting) < MAX_WAITING)
        with self._changed:
            self._waiting[conversation] = copy, pending
            self._changed.notify_all()

    def remove(self, conversation: str) -> None:
        """Delete a conversation, if it is there."""
        with self._changed:
            self._waiting.pop(conversation, None)
            self._failed.discard(conversation)
        self._await(lambda: conversation != self._writing)
        self._files.remove(_name(conversation))

    def close(self) -> None:
        """Wait until everything is written. Closing twice is fine."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._writer.join()
        self._files.release()

    def _await(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(condition)

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                conversation, (copy, pending) = self._waiting.popitem(last=False)
                self._writing = conversation
                self._changed.notify_all()
            try:
                is_kept = self._files.write(_name(conversation), copy, pending)
            except Exception:  # this thread must go on: others wait for it
                logger.exception("a conversation could not be kept")
                is_kept = False
            with self._changed:
                self._writing = None
                (self._failed.discard if is_kept else self._failed.add)(conversation)
                self._changed.notify_all()


def _name(conversation: str) -> str:
    return f"conversation-{hashlib.blake2b(conversation.encode(), digest_size=NAME_BYTES).hexdigest()}.safetensors"
