"""Streams that have taken the beginning of a prompt, kept for prompts that begin alike.

Clients of one application send the same system message and the same tools. Their first tokens are fed once: a copy of
the stream is kept, and later prompts go on from it, with the very same bits as if their own stream had been fed these
tokens in the same chunks. A beginning is found by a hash over its ids, so a match means equal ids.
"""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sinkrt.contract import Manifest
from sinkrt.conversation import IdHistory, starts
from sinkrt.errors import UsageError, problem
from sinkrt.graph_runner import StreamCopy
from sinkrt.prefix_folder import PrefixFolder

MIN_PREFIX_TOKENS = 64
"""A copy of a stream costs about as much as a token; shorter beginnings are fed faster than they are looked after."""

REMEMBERED_PROMPTS = 32
"""Prompts whose ids are remembered, each owner's and all together: what a later one shares with them is kept."""


class Key(NamedTuple):
    """What a beginning is found by: nobody finds another owner's."""

    owner: str
    digest: bytes


@dataclasses.dataclass(frozen=True)
class Prefix:
    """A beginning of a prompt: its ids' history, and the stream that has taken it."""

    history: IdHistory
    copy: StreamCopy


class PrefixStore:
    """Beginnings of prompts by owner and ids; the least recently used ones make room for new ones.

    max_bytes: memory for the copies, >= 0. folder: keeps them beyond the process and the memory; None: nothing does.

    Raises: UsageError.
    """

    def __init__(self, max_bytes: int, folder: PrefixFolder | None = None) -> None:
        if max_bytes < 0:
            raise UsageError(problem("max_bytes", received=max_bytes, expected=">= 0", fix="raise it"))
        self._max_bytes, self._folder = max_bytes, folder
        self._kept: collections.OrderedDict[Key, tuple[int, StreamCopy]] = collections.OrderedDict()  # by count
        self._num_bytes = 0
        self._prompts: collections.OrderedDict[Key, npt.NDArray[np.int32]] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        """Memory that the copies take."""
        return self._num_bytes

    def longest(self, owner: str, ids: npt.NDArray[np.int64]) -> int:
        """Number of ids of the longest kept beginning of `ids`, int64 [N], that leaves one id at least; 0: none."""
        return next((count for count, _ in self._matches(owner, ids)), 0)

    def find(self, owner: str, ids: npt.NDArray[np.int64]) -> Prefix | None:
        """The beginning whose length `longest` gives, or None."""
        for count, key in self._matches(owner, ids):
            copy = self._taken(key, count)
            if copy is not None:
                history = IdHistory()
                history.take(ids[:count])
                return Prefix(history, copy)
        return None

    def boundaries(self, owner: str, ids: npt.NDArray[np.int64], opening: int) -> list[int]:
        """Numbers of first ids that are worth keeping when a stream has taken them, and notes the prompt.

        ids: int64 [N]. opening: how many of them every conversation of this application begins with; 0: unknown. What a
        remembered prompt begins with too is the other one. Those that are kept already, and short ones, are left out.
        """
        shared = max(
            (_common_start(ids, other) for key, other in self._prompts.items() if key.owner == owner), default=0
        )
        self._remember(owner, ids)
        counts = {count for count in (opening, min(shared, ids.size - 1)) if MIN_PREFIX_TOKENS <= count < ids.size}
        found = starts(ids, list(counts))
        return sorted(count for count, digest in found.items() if not self._has(Key(owner, digest), count))

    def keep(self, owner: str, history: IdHistory, copy: StreamCopy) -> None:
        """Keep the copy of a stream that has taken what `history` says; nothing if it is larger than all the memory."""
        key = Key(owner, history.digest())
        if self._folder is not None:
            self._folder.keep(owner, key.digest, copy)
        self._add(key, copy)

    def close(self) -> None:
        """Wait until the folder's files are written."""
        if self._folder is not None:
            self._folder.close()

    def _matches(self, owner: str, ids: npt.NDArray[np.int64]) -> list[tuple[int, Key]]:
        """Numbers and keys of all kept beginnings of ids, the longest first."""
        counts = [count for key, (count, _) in self._kept.items() if key.owner == owner]
        if self._folder is not None:
            counts += self._folder.counts(owner)
        digests = starts(ids[:-1], counts)
        matches = [(count, Key(owner, digest)) for count, digest in sorted(digests.items(), reverse=True)]
        return [(count, key) for count, key in matches if self._has(key, count)]

    def _has(self, key: Key, count: int) -> bool:
        return key in self._kept or (self._folder is not None and self._folder.has(key.owner, key.digest, count))

    def _taken(self, key: Key, count: int) -> StreamCopy | None:
        """A copy by its key, from memory or from the folder, used now."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][1]
        copy = None if self._folder is None else self._folder.read(key.owner, key.digest, count)
        if copy is not None:
            self._add(key, copy)
        return copy

    def _add(self, key: Key, copy: StreamCopy) -> None:
        if copy.nbytes > self._max_bytes or key in self._kept:
            return
        self._kept[key] = copy.position, copy
        self._num_bytes += copy.nbytes
        while self._num_bytes > self._max_bytes:
            _, (_, oldest) = self._kept.popitem(last=False)
            self._num_bytes -= oldest.nbytes

    def _remember(self, owner: str, ids: npt.NDArray[np.int64]) -> None:
        history = IdHistory()
        history.take(ids)
        key = Key(owner, history.digest())
        self._prompts[key] = ids.astype(np.int32)
        self._prompts.move_to_end(key)
        while len(self._prompts) > REMEMBERED_PROMPTS:
            self._prompts.popitem(last=False)


def open_prefix_store(manifest: Manifest, max_bytes: int, folder: Path | None, max_folder_bytes: int) -> PrefixStore:
    """Make a store, with a folder if one is given.

    Raises: UsageError if the folder cannot be used.
    """
    return PrefixStore(max_bytes, None if folder is None else PrefixFolder(folder, manifest, max_folder_bytes))


def _common_start(ids: npt.NDArray[np.int64], other: npt.NDArray[np.int32]) -> int:
    size = min(ids.size, other.size)
    differ = np.flatnonzero(ids[:size] != other[:size])
    return int(differ[0]) if differ.size else size
