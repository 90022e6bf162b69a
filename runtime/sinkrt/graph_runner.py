"""Run a bundle's graphs for some of B streams, and keep states and `StreamTable` in step.

Whatever interrupts a call, the table says what counts: the order of the lines below is the reason.
Twin of `Session::run` and `Session::prefill` in runtime/cpp/src/session/session.cpp.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from sinkrt.backends.base import Backend, StateArray, Verifier
from sinkrt.contract import NO_TOKEN, Manifest
from sinkrt.contract.constants import CPU, SCALE_KINDS, TENSORRT_TARGET
from sinkrt.contract.drafts import rows_by_state
from sinkrt.errors import UsageError, problem
from sinkrt.state_rows import StateRows
from sinkrt.stream_table import StreamTable

STEPS_OF_A_CHUNK = 8
"""A chunk of T tokens is about this much faster than T steps (measured on a CPU); shorter rests go step by step."""

STEPS_OF_A_GPU_CHUNK = 64
"""The same with TensorRT: matmuls of 256 tokens take about as long as those of three steps (7B, INT8, on an H200)."""

SMALLEST_CHUNK = 2
"""One token is a step."""

WINDOW_KINDS = ("window_k", "window_v", *SCALE_KINDS)

SHARED_CHUNK = 64
"""Tokens of a chunk for which streams that are past their prompts are held up, where a part of a chunk costs less."""


def smallest_chunk(chunk_size: int, target: str) -> int:
    """Tokens from which on one run of the prefill graph is quicker than as many steps.

    chunk_size: T. target: of the manifest; matmuls of the CPU library compute rows of tokens alone.
    """
    if chunk_size == 1:
        return sys.maxsize
    if target == CPU:
        return SMALLEST_CHUNK
    return max(SMALLEST_CHUNK, chunk_size // (STEPS_OF_A_GPU_CHUNK if target == TENSORRT_TARGET else STEPS_OF_A_CHUNK))


def shared_chunk(manifest: Manifest) -> int:
    """Most tokens of a chunk while other streams wait for their next token."""
    size = manifest.stream.chunk_size
    return min(size, SHARED_CHUNK) if manifest.target == CPU else size


@dataclasses.dataclass(frozen=True)
class StreamCopy:
    """One stream taken out of a session.

    states: by input name, without the batch axis. recent_ids: int64 [C]. logits: float32 [vocab].
    shortened: names of states whose second axis may end early: rows that no token has been written to are left out.
    """

    states: Mapping[str, np.ndarray]
    position: int
    recent_ids: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]
    shortened: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(a.nbytes for a in (*self.states.values(), self.recent_ids, self.logits))


@dataclasses.dataclass(frozen=True)
class _Drafts:
    """Tokens whose rows wait in the verifier's buffers. position: int64 [B], of the first of each stream."""

    verifier: Verifier
    position: npt.NDArray[np.int64]

    def left(self, stream: int, position: int) -> int:
        """How many tokens of a stream that is at `position` are not committed yet."""
        end = int(self.position[stream] + self.verifier.num_valid[stream])
        return end - position if self.position[stream] <= position <= end else 0


class GraphRunner:
    """A backend and the table of its streams. Arguments are checked by the caller, `Session`.

    chunk_size: T, tokens that one run of the prefill graph takes. target: of the manifest.
    """

    def __init__(self, backend: Backend, table: StreamTable, chunk_size: int, target: str) -> None:
        self.backend = backend
        self._table = table
        self._drafts: _Drafts | None = None  # verified, and not committed to the end
        self._state_rows: StateRows | None = None
        self._chunk_size = chunk_size
        self._smallest_chunk = smallest_chunk(chunk_size, target)

    def step(self, ids: npt.NDArray[np.int64], active: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Feed one token to each active stream. ids, active: int64 [n]. Returns: logits, float32 [B, vocab].

        The graph knows no idle streams. They take some token at the position that comes next: it lands in the slot
        of the token that this very position evicts, which nothing reads any more, and is overwritten when the
        position is really taken. Recurrent states would keep it: there a negative id marks an idle stream.

        Raises: BackendError; no position has advanced then.
        """
        backend, table = self.backend, self._table
        self._drafts = None
        idle = np.delete(table.streams, active) if active.size < table.streams.size else active[:0]
        kept_logits = backend.logits[idle]  # a copy
        backend.ids[active, 0] = ids
        if table.is_recurrent:
            backend.ids[idle, 0] = NO_TOKEN
        backend.position[...] = table.position
        table.hold(active)
        backend.run()
        backend.logits[idle] = kept_logits
        table.took(active, ids)
        return backend.logits

    def prefill(
        self, tokens: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], active: npt.NDArray[np.int64]
    ) -> None:
        """Feed tokens: in chunks where those are quicker, then step by step, all rows at once.

        tokens: int64 [n, N]; of row i the first counts[i] are fed to stream active[i]. counts, active: int64 [n].

        Raises: BackendError; positions are at the first token that failed.
        """
        done = self._run_chunks(tokens, counts, active)
        for i in range(int(done.min()), int(counts.max())):
            rows = np.flatnonzero((done <= i) & (i < counts))
            if rows.size:
                self.step(tokens[rows, i], active[rows])

    def _run_chunks(
        self, tokens: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], active: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Feed what chunks are good for; a rest that steps feed as quickly is left. Returns: how many were fed, [n]."""
        done = np.zeros_like(counts)
        for row, stream in enumerate(active.tolist()):
            while (rest := int(counts[row] - done[row])) >= self._smallest_chunk:
                size = min(rest, self._chunk_size)
                self._run_chunk(stream, tokens[row, done[row] : done[row] + size])
                done[row] += size
        return done

    def _run_chunk(self, stream: int, ids: npt.NDArray[np.int64]) -> None:
        """Run the prefill graph once: 1 .. T tokens of one stream."""
        backend, table = self.backend, self._table
        self._drafts = None
        table.start_chunk(stream, ids, backend.logits[stream])
        try:
            backend.run_chunk(stream, ids, int(table.position[stream]))
        finally:
            table.settle_chunk()

    def verifier(self, manifest: Manifest) -> Verifier:
        """The graph that verifies drafts, opened the first time.

        Raises: UsageError if bundle or backend has none.
        """
        verifier = self.backend.load_verifier()
        if verifier is None:
            has_none = not manifest.num_drafts
            raise UsageError(
                problem(
                    "speculate",
                    received="a bundle without a graph that verifies drafts" if has_none else "a backend on a GPU",
                    expected="a bundle exported with --speculate K" if has_none else "backend 'ort'",
                    fix="export the model again with --speculate 8" if has_none else "leave it out",
                )
            )
        if self._state_rows is None:
            names = rows_by_state(manifest)
            rows = {state.input: verifier.rows[names[state.input]] for state in manifest.states}
            states = {name: np.asarray(state) for name, state in self.backend.states.items()}
            self._state_rows = StateRows(manifest.states, states, rows)
        return verifier

    def verify(
        self,
        verifier: Verifier,
        tokens: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
        active: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.float32]:
        """Compute the logits after each of some tokens, and feed none. Arguments as of `prefill`, of at most T tokens.

        Returns: float32 [B, T, vocab]; rows of other streams, and behind the tokens of a stream, mean nothing.

        Raises: BackendError; nothing has changed then.
        """
        self._drafts = None
        verifier.ids.fill(0)  # any token: what does not count is computed and dropped
        verifier.ids[active, : tokens.shape[1]] = np.maximum(tokens, 0)
        verifier.num_valid.fill(0)
        verifier.num_valid[active] = counts
        verifier.position[...] = self._table.position
        verifier.run()
        self._drafts = _Drafts(verifier, self._table.position.copy())
        return np.asarray(verifier.logits)

    def commit(self, counts: npt.NDArray[np.int64], active: npt.NDArray[np.int64]) -> None:
        """Feed the next counts[i] tokens that `verify` was given for stream active[i], each as a step would.

        Whatever interrupts it is made up for before the next call: rows and ids are still there.

        Raises: UsageError, before anything changes, if so many were not verified, or a stream has gone on since.
        """
        drafts, table = self._drafts, self._table
        for stream, count in zip(active.tolist(), counts.tolist(), strict=True):
            left = 0 if drafts is None else drafts.left(stream, int(table.position[stream]))
            if not 0 <= count <= left:
                raise UsageError(
                    problem(
                        f"tokens of stream {stream}",
                        received=count,
                        expected=f"0 .. {left}, as many as were verified and are left",
                        fix="call verify first",
                    )
                )
        if drafts is None:
            return
        for stream, count in zip(active.tolist(), counts.tolist(), strict=True):
            if count:
                table.unfinished = functools.partial(
                    self._commit_stream, drafts, stream, int(table.position[stream]), count
                )
                table.unfinished()

    def num_verified(self) -> npt.NDArray[np.int64]:
        """Tokens of each stream that `commit` could feed, int64 [B]."""
        drafts, position = self._drafts, self._table.position
        left = [0 if drafts is None else drafts.left(i, int(t)) for i, t in enumerate(position)]
        return np.array(left, dtype=np.int64)

    def _commit_stream(self, drafts: _Drafts, stream: int, position: int, count: int) -> None:
        first, table = position - int(drafts.position[stream]), self._table
        if self._state_rows is not None:
            self._state_rows.write(stream, position, first, count)
        self.backend.logits[stream] = drafts.verifier.logits[stream, first + count - 1]
        table.took_many(stream, position, drafts.verifier.ids[stream, first : first + count])
        table.unfinished = None

    def reset(self, chosen: npt.NDArray[np.int64]) -> None:
        """Let some streams start again at position 0. chosen: int64 [n]."""
        table, self._drafts = self._table, None
        # The position first: at 0 every slot is masked, so an interrupt cannot leave a stream that is half there.
        table.hold(chosen)
        table.position[chosen] = 0
        table.recent_ids[chosen] = -1
        for state in self.backend.states.values():
            state[chosen] = 0
        table.release(chosen)

    def copy_stream(self, stream: int, windows: frozenset[str] = frozenset()) -> StreamCopy:
        """Copy one stream out. windows: states that are copied without rows that no token has been written to."""
        position = int(self._table.position[stream])

        def rows(name: str, state: StateArray) -> np.ndarray:
            one: np.ndarray = state[stream]
            return one[:, :position].copy() if name in windows else one.copy()

        return StreamCopy(
            states={name: rows(name, state) for name, state in self.backend.states.items()},
            position=position,
            recent_ids=self._table.recent_ids[stream].copy(),
            logits=self.backend.logits[stream].copy(),
            shortened=windows,
        )

    def place_stream(self, stream: int, copy: StreamCopy) -> None:
        """Put a copy into a stream.

        Raises: UsageError if its states are not those of this bundle.
        """
        backend, table = self.backend, self._table
        if not _fits(copy, backend.states):
            raise UsageError(
                problem(
                    "stream",
                    received="a copy from another bundle",
                    expected="one of this bundle",
                    fix="use copy_stream of the same bundle",
                )
            )
        row, self._drafts = table.streams[[stream]], None
        table.hold(row)
        table.position[stream] = 0  # as in `reset`; the copy's position comes last
        for name, state in backend.states.items():
            _place(state, stream, copy.states[name])
        backend.logits[stream] = copy.logits
        table.recent_ids[stream] = copy.recent_ids
        table.position[stream] = copy.position
        table.release(row)

    def kept(self) -> dict[str, StateArray]:
        """Arrays that make up the streams, by the names of a state file: the arrays themselves, no copies."""
        backend, table = self.backend, self._table
        return {**backend.states, "logits": backend.logits, "recent_ids": table.recent_ids, "position": table.position}

    def restore(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Write the tensors of a state file, by the names of `kept`, into all streams."""
        kept, table, self._drafts = self.kept(), self._table, None
        table.hold(table.streams)
        table.position.fill(0)  # as in `reset`; the file's position comes last
        for name in [*(name for name in kept if name != "position"), "position"]:
            kept[name][...] = tensors[name]
        table.release(table.streams)


def window_states(manifest: Manifest) -> frozenset[str]:
    """Names of the states that have a row a token, in the order in which a ring is filled the first time."""
    return frozenset(state.input for state in manifest.states if state.kind in WINDOW_KINDS)


def _fits(copy: StreamCopy, states: Mapping[str, StateArray]) -> bool:
    """Whether a copy is of a bundle with these states."""

    def is_part(name: str, found: tuple[int, ...], whole: tuple[int, ...]) -> bool:
        if name not in copy.shortened:
            return found == whole
        return found[:1] + found[2:] == whole[:1] + whole[2:] and found[1] <= whole[1]

    return copy.states.keys() == states.keys() and all(
        is_part(name, copy.states[name].shape, state.shape[1:]) for name, state in states.items()
    )


def _place(state: StateArray, stream: int, rows: np.ndarray) -> None:
    """Write one stream of a state; rows that are left out become zero, as after a reset."""
    if rows.shape == state.shape[1:]:
        state[stream] = rows
        return
    if isinstance(state, np.ndarray):
        state[stream, :, : rows.shape[1]] = rows
        state[stream, :, rows.shape[1] :] = 0
        return
    whole = np.zeros(state.shape[1:], rows.dtype)  # memory of a device is written in one piece
    whole[:, : rows.shape[1]] = rows
    state[stream] = whole
