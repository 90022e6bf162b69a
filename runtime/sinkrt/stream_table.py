"""Books of a session's B streams: tokens taken, recent ids, and whether each stream is whole.

Bookkeeping only: states and logits belong to the backend, and `sinkrt.graph_runner` keeps the two in step.
Twin of the members position_, recent_ids_ and damaged_ of `Session` in runtime/cpp/include/sinkrt/session.h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sinkrt.arguments import integers
from sinkrt.contract import Manifest
from sinkrt.errors import StateError, UsageError, problem


class StreamTable:
    """Table with one row a stream.

    position: int64 [B], tokens taken, which is the position of the next one.
    recent_ids: int64 [B, C], the last C ids. The id of token t lies at t mod C; -1: none.
    streams: int64 [B], 0 .. B-1.
    is_recurrent: whether the model has recurrent states. They know no positions, so a token that was cut short cannot
    be fed again.
    """

    def __init__(self, manifest: Manifest) -> None:
        stream = manifest.stream
        self.position = np.zeros(stream.batch, dtype=np.int64)
        self.recent_ids = np.full((stream.batch, stream.capacity), -1, dtype=np.int64)
        self.streams = np.arange(stream.batch)
        self.is_recurrent = manifest.is_recurrent
        self._position_limit = stream.position_limit
        self._damaged: set[int] = set()
        self._chunk: _Chunk | None = None  # now running
        self.unfinished: Callable[[], None] | None = None
        """Rest of a call that must be done before any other: it can be repeated, and then takes itself away."""

    def chosen(self, streams: Sequence[int] | None, *, damaged: bool = False) -> npt.NDArray[np.int64]:
        """Streams that a caller means, int64 [n], all if None. Damaged ones are refused unless `damaged` allows them.

        Raises: UsageError, StateError.
        """
        self.settle_chunk()
        chosen = self.streams if streams is None else np.asarray(integers(streams), dtype=np.int64).reshape(-1)
        batch = self.streams.size
        unknown = chosen[(chosen < 0) | (chosen >= batch)]
        if unknown.size or not chosen.size or np.unique(chosen).size != chosen.size:
            received = f"{list(chosen)}" if not unknown.size else f"stream {unknown[0]}"
            raise UsageError(
                problem(
                    "streams",
                    received=received,
                    expected=f"some of 0 .. {batch - 1}, each once",
                    fix="use a stream of this bundle",
                )
            )
        if self._damaged and not damaged and (broken := self._damaged.intersection(chosen.tolist())):
            raise StateError(
                problem(
                    f"stream {min(broken)}",
                    received="one that an error cut short",
                    expected="a whole stream",
                    fix="reset it, or load a saved state",
                )
            )
        return chosen

    def check_room(self, active: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> None:
        """Make sure that each stream can take so many more tokens. active, counts: int64 [n].

        Raises: UsageError.
        """
        limit = self._position_limit
        for position, count in zip(self.position[active].tolist(), counts.tolist(), strict=True):
            if position + count > limit:
                raise UsageError(
                    problem(
                        "position",
                        received=f"{position} and {count} more tokens",
                        expected=f"at most {limit} tokens in a stream",
                        fix="reset the stream",
                    )
                )

    def recent(self, stream: int) -> npt.NDArray[np.int64]:
        """The last tokens of a stream, oldest first: int64 [N], N <= C."""
        position, capacity = int(self.position[stream]), self.recent_ids.shape[1]
        count = min(position, capacity)
        ids: npt.NDArray[np.int64] = self.recent_ids[stream, np.arange(position - count, position) % capacity]
        return ids

    # --- marks of streams that are not whole ---

    def hold(self, streams: npt.NDArray[np.int64]) -> None:
        """Mark streams whose work must reach its end, where there are recurrent states: these are not masked."""
        if self.is_recurrent:
            self._damaged.update(streams.tolist())

    def release(self, streams: npt.NDArray[np.int64]) -> None:
        """Take the marks back: the streams are whole."""
        if self._damaged:
            self._damaged.difference_update(streams.tolist())

    # --- tokens taken ---

    def took(self, active: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> None:
        """Count one token of each active stream. active, ids: int64 [n]."""
        self.recent_ids[active, self.position[active] % self.recent_ids.shape[1]] = ids
        # Last: until here the token does not count, and running its position again overwrites all that it wrote.
        self.position[active] += 1
        self.release(active)

    def took_many(self, stream: int, position: int, ids: npt.NDArray[np.int64]) -> None:
        """Count tokens of a stream from `position` on; the same once more changes nothing. ids: int64 [n]."""
        self.recent_ids[stream, np.arange(position, position + ids.size) % self.recent_ids.shape[1]] = ids
        self.position[stream] = position + ids.size

    def start_chunk(self, stream: int, ids: npt.NDArray[np.int64], logits: npt.NDArray[np.float32]) -> None:
        """Note a chunk that is about to run.

        ids: int64 [n]. logits: float32 [vocab], the stream's row; NaN at 0 until the run has reached its end.
        """
        logits[0] = np.nan
        self._chunk = _Chunk(stream, int(self.position[stream]), ids, logits)

    def settle_chunk(self) -> None:
        """Count the tokens of a chunk that has run, whatever came after it; give up a stream whose chunk has not.

        Unlike a step, a chunk overwrites tokens that it would read again. So one that was cut short cannot be
        repeated, and an interrupt between the run and its bookkeeping must not lose that it has run.
        """
        if self.unfinished is not None:
            self.unfinished()
        if self._chunk is None:
            return
        stream, position, ids, logits = self._chunk
        if np.isnan(logits[0]):
            self._damaged.add(stream)
        else:
            self.took_many(stream, position, ids)
        self._chunk = None


class _Chunk(NamedTuple):
    stream: int
    position: int
    ids: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]
