"""A decoding session: endless, in constant memory.

    session = Session.load("bundle")
    logits = session.prefill(ids)          # any number of tokens, far past the window too
    while True:
        logits = session.step(pick(logits))

All buffers are allocated by `load`; from token to token nothing grows. After `num_sink_tokens + window_size` tokens
the cache holds the first S and the last W of them, exactly as if each had been fed one by one (they are).
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sinkrt.answer import Answer, AnswerParams
from sinkrt.arguments import integers, token_ids, valid_counts
from sinkrt.backends import check_backend, load_backend
from sinkrt.backends.base import Backend, StateArray
from sinkrt.contract import NO_TOKEN, RECURRENT_KINDS, Manifest, check_files, load_manifest
from sinkrt.errors import StateError, UsageError, problem
from sinkrt.sampler import SamplingParams
from sinkrt.state import read_state, save_state

if TYPE_CHECKING:
    from sinkrt.text import Tokenizer

MAX_THREADS = 1024
"""More than any machine of today has cores; ONNX Runtime starts as many as it is asked for, and aborts if it cannot."""

STEPS_OF_A_CHUNK = 8
"""A chunk of T tokens is about this much faster than T steps (measured on a CPU); shorter rests go step by step."""


@dataclasses.dataclass(frozen=True)
class StreamCopy:
    """One stream taken out of a session.

    states: by input name, without the batch axis. recent_ids: int64 [C]. logits: float32 [vocab].
    """

    states: Mapping[str, np.ndarray]
    position: int
    recent_ids: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(a.nbytes for a in (*self.states.values(), self.recent_ids, self.logits))


class Session:
    """B streams over one bundle. Make one with `Session.load`; use one session a thread.

    Whatever interrupts a call (an error, Ctrl-C), the session stays consistent: `position` tells how many tokens
    count, and a token that was cut short can be fed again. Where it cannot, inside a chunk and in models with linear
    attention, the stream says so until it is reset.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        backend: str,
        threads: int | None,
        repack_prefill: bool | None = None,
    ) -> None:
        stream = manifest.stream
        self._bundle = bundle
        self._manifest = manifest
        self._backend: Backend | None = load_backend(backend, bundle, manifest, threads, repack_prefill)
        self._position = np.zeros(stream.batch, dtype=np.int64)
        # The last C ids of each stream, that of token t at t mod C; -1: none. For the repetition penalty.
        self._recent_ids = np.full((stream.batch, stream.capacity), -1, dtype=np.int64)
        self._streams = np.arange(stream.batch)
        self._chunk: tuple[int, int, npt.NDArray[np.int64]] | None = None  # (stream, position, ids) now running
        self._damaged: set[int] = set()  # streams that something has cut short where it cannot be repeated
        self._is_recurrent = any(state.kind in RECURRENT_KINDS for state in manifest.states)
        self._tokenizer: Tokenizer | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        backend: str = "ort",
        *,
        threads: int | None = None,
        verify: bool = True,
        repack_prefill: bool | None = None,
    ) -> Session:
        """Open the bundle folder `path`.

        threads: CPU threads of one operator (None: all physical cores).
        verify: compare every file's SHA-256 with the manifest; False compares sizes only, which is faster.
        repack_prefill: whether prefill gets a copy of the weights for itself, which makes it about a seventh faster;
        None: if memory is plentiful.

        Raises: BundleError if the bundle is missing, corrupt or newer; BackendError; UsageError.
        """
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise UsageError(
                problem("threads", received=threads, expected=f"1 .. {MAX_THREADS}", fix="leave it out for all cores")
            )
        check_backend(backend)
        bundle = Path(path)
        manifest = load_manifest(bundle)
        check_files(bundle, manifest, hashes=verify)
        return cls(bundle, manifest, backend, threads, repack_prefill)

    @property
    def manifest(self) -> Manifest:
        """All that is known of the bundle."""
        return self._manifest

    @property
    def batch(self) -> int:
        """B, streams decoded together."""
        return self._manifest.stream.batch

    @property
    def num_sink_tokens(self) -> int:
        """S, first tokens kept for ever."""
        return self._manifest.stream.num_sink_tokens

    @property
    def window_size(self) -> int:
        """W, most recent tokens kept."""
        return self._manifest.stream.window_size

    @property
    def capacity(self) -> int:
        """C = S + W."""
        return self._manifest.stream.capacity

    @property
    def position(self) -> npt.NDArray[np.int64]:
        """int64 [B], a copy: how many tokens each stream has taken, which is the next token's position."""
        return self._position.copy()

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer, read on first use.

        Raises: UsageError if the bundle has none; BundleError if it is unreadable.
        """
        if self._tokenizer is None:
            from sinkrt.text import Tokenizer

            self._tokenizer = Tokenizer.load(self._bundle, self._manifest)
        return self._tokenizer

    @property
    def buffers(self) -> dict[str, StateArray]:
        """Every buffer of the session by tensor name, for inspection: their addresses never change."""
        backend = self._loaded()
        return {"ids": backend.ids, "position": backend.position, "logits": backend.logits, **backend.states}

    @property
    def not_recorded(self) -> str | None:
        """Why steps are not replayed as CUDA graphs, which costs time; None: they are, or there is no GPU.

        Raises: UsageError if the session is closed.
        """
        return self._loaded().not_recorded

    @property
    def chunk_size(self) -> int:
        """T, tokens that one run of the prefill graph takes; 1 if the bundle has none."""
        return self._manifest.stream.chunk_size

    @property
    def smallest_chunk(self) -> int:
        """Tokens from which on one run of the prefill graph is quicker than as many steps.

        A chunk costs the same however few tokens it holds.
        """
        return sys.maxsize if self.chunk_size == 1 else max(2, self.chunk_size // STEPS_OF_A_CHUNK)

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """float32 [B, vocab]: of the token after each stream's last one; the array is reused by the next call.

        A row means nothing while its stream is at position 0.
        """
        return self._loaded().logits

    def recent_ids(self, stream: int = 0) -> npt.NDArray[np.int64]:
        """int64 [N], N <= C: the last tokens that a stream took, oldest first.

        Raises: UsageError for an unknown stream.
        """
        (stream,) = self._chosen([stream])
        position = int(self._position[stream])
        count = min(position, self.capacity)
        ids: npt.NDArray[np.int64] = self._recent_ids[stream, np.arange(position - count, position) % self.capacity]
        return ids

    def step(self, ids: npt.ArrayLike, streams: Sequence[int] | None = None) -> npt.NDArray[np.float32]:
        """Feed one token to each stream, or to some: the others do not notice.

        ids: int [B], or one for each of `streams`. Returns: logits float32 [B, vocab] of the next token, those of idle
        streams unchanged; the array is reused by the next call.

        Raises: UsageError for a wrong shape, type, id or stream; StateError for a stream that an error has cut short;
        BackendError if the step failed (no position advances).
        """
        active = self._chosen(streams)
        tokens = token_ids(ids, (len(active),), self._manifest.model.vocab_size)
        self._check_room(active, np.ones(len(active), dtype=np.int64))
        return self._run(tokens, active)

    def prefill(
        self,
        ids: npt.ArrayLike,
        num_valid: npt.ArrayLike | None = None,
        streams: Sequence[int] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Feed tokens to each stream, or to some: exactly as if they came one by one, but faster.

        ids: int [B, N], N >= 1, a row for each of `streams` if given; [N] if that is one row.
        num_valid: int, how many leading ids of each row count, 1 .. N; None: all.
        Returns: logits float32 [B, vocab] after each stream's last token, those of idle streams unchanged; the array
        is reused by the next call.

        Raises: UsageError, before any token is fed; StateError for a stream that an error has cut short; BackendError,
        with `position` at the first token that failed.
        """
        active = self._chosen(streams)
        array = integers(ids)
        if array.ndim == 1 and len(active) == 1:
            array = array[None, :]
        if array.size == 0:
            raise UsageError(problem("prompt", received="no tokens", expected="at least one", fix="give some text"))
        width = array.shape[-1] if array.ndim else 1
        tokens = token_ids(array, (len(active), width), self._manifest.model.vocab_size)
        counts = valid_counts(num_valid, len(active), width)
        self._check_room(active, counts)
        done = self._run_chunks(tokens, counts, active)
        for i in range(int(done.min()), int(counts.max())):
            rows = np.flatnonzero((done <= i) & (i < counts))
            if rows.size:
                self._run(tokens[rows, i], active[rows])
        return self.logits

    def reset(self, streams: Sequence[int] | None = None) -> None:
        """Forget everything: all streams, or some, start again at position 0.

        Raises: UsageError for an unknown stream.
        """
        chosen = self._chosen(streams, damaged=True)
        # The position first: at 0 every slot is masked, so an interrupt cannot leave a stream that is half there.
        self._hold(chosen)
        self._position[chosen] = 0
        self._recent_ids[chosen] = -1
        for state in self._loaded().states.values():
            state[chosen] = 0
        self._damaged.difference_update(chosen.tolist())

    def copy_stream(self, stream: int) -> StreamCopy:
        """All that there is of one stream, to go on with later in any stream of this bundle.

        Raises: UsageError for an unknown stream; StateError for one that an error has cut short.
        """
        (stream,) = self._chosen([stream])
        backend = self._loaded()
        return StreamCopy(
            states={name: state[stream].copy() for name, state in backend.states.items()},
            position=int(self._position[stream]),
            recent_ids=self._recent_ids[stream].copy(),
            logits=backend.logits[stream].copy(),
        )

    def place_stream(self, stream: int, copy: StreamCopy) -> None:
        """Let `stream` go on where `copy` was taken, with the very same bits; what it held is forgotten.

        Raises: UsageError for an unknown stream or the copy of another bundle's.
        """
        (stream,) = self._chosen([stream], damaged=True)
        backend = self._loaded()
        shapes = {name: state.shape[1:] for name, state in backend.states.items()}
        if shapes != {name: state.shape for name, state in copy.states.items()}:
            raise UsageError(
                problem(
                    "stream",
                    received="a copy from another bundle",
                    expected="one of this bundle",
                    fix="use copy_stream of the same bundle",
                )
            )
        self._hold(self._streams[[stream]])
        self._position[stream] = 0  # as in `reset`; the copy's position comes last
        for name, state in backend.states.items():
            state[stream] = copy.states[name]
        backend.logits[stream] = copy.logits
        self._recent_ids[stream] = copy.recent_ids
        self._position[stream] = copy.position
        self._damaged.discard(stream)

    def save_state(self, path: str | Path) -> None:
        """Write sinks, window, position, recent ids and logits to a safetensors file, atomically.

        Raises: UsageError if it cannot be written; StateError if an error has cut a stream short.
        """
        self._chosen(None)
        save_state(Path(path), self._manifest, self._kept())

    def load_state(self, path: str | Path) -> None:
        """Go on where `save_state` was called, with the very same bits. A failed load changes nothing.

        Raises: StateError if the file is truncated, of another version or of another bundle.
        """
        kept = self._kept()
        tensors = read_state(Path(path), self._manifest)
        self._hold(self._streams)
        self._position.fill(0)  # as in `reset`; the file's position comes last
        for name in [*(name for name in kept if name != "position"), "position"]:
            kept[name][...] = tensors[name]
        self._damaged.clear()

    def generate(
        self,
        prompt: str | Sequence[int] | npt.NDArray[np.integer] | None,
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        allow_special: bool = False,
    ) -> Iterator[str]:
        """Feed `prompt`, a text or ids, and yield the answer's text piece by piece, whole characters only.

        prompt: None goes on where the stream stands, as after `load_state` in the middle of an answer.
        max_tokens: None goes on until the model ends its text, or for ever with `ignore_eos`.
        stop: one or several texts; the answer ends before the first that comes, special tokens included.
        allow_special: the names of special tokens in a prompt of text become those tokens, as in a rendered chat;
        otherwise they are text like any other, and a warning says so.
        The other options are those of `SamplingParams`. The prompt is fed at once, each token of the answer before
        the piece that it completes is yielded. The stream goes on: a later call continues it. The token that ends
        a text is not fed.

        Raises: UsageError if the prompt is empty or an option is out of range, before any token is fed, and if B
        is not 1 or the bundle has no tokenizer; StateError, BackendError.
        """
        if self.batch != 1:
            raise UsageError(
                problem(
                    "generate",
                    received=f"a bundle of {self.batch} streams",
                    expected="batch 1",
                    fix="use a Scheduler, or export with --batch 1",
                )
            )
        params = AnswerParams(max_tokens, (stop,) if isinstance(stop, str) else tuple(stop), ignore_eos)
        sampling = SamplingParams(temperature, top_k, top_p, repetition_penalty, seed)
        tokenizer, model = self.tokenizer, self._manifest.model
        # Fed here, not at the first next(): a generator's body runs late, and so would its errors.
        if prompt is None:
            if not self._position[0]:
                raise UsageError(
                    problem(
                        "prompt",
                        received="none",
                        expected="some text: the stream is empty",
                        fix="give a prompt, or load a state",
                    )
                )
        elif isinstance(prompt, str):
            if not allow_special and (name := tokenizer.special_in(prompt)) is not None:
                warnings.warn(
                    f"'{name}' in the prompt is taken as ordinary text; allow_special=True makes it a token",
                    stacklevel=2,
                )
            begun = bool(self._position[0])
            self.prefill(tokenizer.prompt_ids(prompt, begun=begun, allow_special=allow_special))
        else:
            self.prefill(prompt)
        answer = Answer(tokenizer, model.eos_token_ids, model.vocab_size, sampling, params)
        answer.follow(self.recent_ids().tolist(), goes_on=prompt is None)
        return self._pieces(answer)

    def _pieces(self, answer: Answer) -> Iterator[str]:
        while answer.finish_reason is None:
            token = answer.pick(self.logits[0], self._recent_ids[0], int(self._position[0]))
            if token is None:
                break
            self.step([token])
            if piece := answer.push(token):
                yield piece
        if rest := answer.flush():
            yield rest

    def require_pinned(self, system: str, *, template_args: Mapping[str, Any] | None = None) -> None:
        """Make sure that the sinks cover this system message, so that a conversation never forgets it.

        template_args: as of `Tokenizer.chat_ids`.

        Raises: UsageError with the number of sinks that it needs; UsageError if there is no chat template, or it shows
        no system message.
        """
        needed = self.tokenizer.opening_size(system, template_args=template_args)
        if needed > self.num_sink_tokens:
            raise UsageError(
                problem(
                    "system message",
                    received=f"one that takes {needed} tokens with its frame",
                    expected=f"at most the bundle's {self.num_sink_tokens} sinks",
                    fix=f"export with --pin-system, or --sink-tokens {needed}",
                )
            )

    def close(self) -> None:
        """Release the backend and its memory; the session cannot be used afterwards. Closing twice is fine."""
        self._backend = None
        if self._tokenizer is not None:
            self._tokenizer.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def _loaded(self) -> Backend:
        if self._backend is None:
            raise UsageError(problem("session", received="a closed one", expected="an open one", fix="load it again"))
        return self._backend

    def _kept(self) -> dict[str, StateArray]:
        """What makes up the streams, by the names of a state file: the session's own arrays."""
        backend = self._loaded()
        return {**backend.states, "logits": backend.logits, "recent_ids": self._recent_ids, "position": self._position}

    def _hold(self, streams: npt.NDArray[np.int64]) -> None:
        """What follows must reach its end, where there is linear attention: its states know no positions, so a token
        that was cut short cannot be fed again, and a state that is not all there is not masked."""
        if self._is_recurrent:
            self._damaged.update(streams.tolist())

    def _chosen(self, streams: Sequence[int] | None, *, damaged: bool = False) -> npt.NDArray[np.int64]:
        """int64 [n]: the streams meant, all if None. `damaged` ones are refused unless allowed.

        Raises: UsageError, StateError.
        """
        self._settle_chunk()
        chosen = self._streams if streams is None else np.asarray(integers(streams), dtype=np.int64).reshape(-1)
        unknown = chosen[(chosen < 0) | (chosen >= self.batch)]
        if unknown.size or not chosen.size or np.unique(chosen).size != chosen.size:
            received = f"{list(chosen)}" if not unknown.size else f"stream {unknown[0]}"
            raise UsageError(
                problem(
                    "streams",
                    received=received,
                    expected=f"some of 0 .. {self.batch - 1}, each once",
                    fix="use a stream of this bundle",
                )
            )
        if not damaged and (broken := self._damaged.intersection(chosen.tolist())):
            raise StateError(
                problem(
                    f"stream {min(broken)}",
                    received="one that an error cut short",
                    expected="a whole stream",
                    fix="reset it, or load a saved state",
                )
            )
        return chosen

    def _run(self, ids: npt.NDArray[np.int64], active: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """One token for each active stream, checked by the caller. ids, active: int64 [n].

        The graph knows no idle streams. They take some token at the position that comes next: it lands in the slot
        of the token that this very position evicts, which nothing reads any more, and is overwritten when the
        position is really taken. Linear attention would keep it: there the graph is told by a negative id.
        """
        backend = self._loaded()
        idle = np.delete(self._streams, active) if active.size < self.batch else active[:0]
        kept_logits = backend.logits[idle]  # a copy
        backend.ids[active, 0] = ids
        if self._is_recurrent:
            backend.ids[idle, 0] = NO_TOKEN
        backend.position[...] = self._position
        self._hold(active)
        backend.run()
        backend.logits[idle] = kept_logits
        self._recent_ids[active, self._position[active] % self.capacity] = ids
        # Last: until here the token does not count, and running its position again overwrites all that it wrote.
        self._position[active] += 1
        self._damaged.difference_update(active.tolist())
        return backend.logits

    def _run_chunks(
        self, tokens: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], active: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Feed what chunks are good for. tokens: int64 [n, N]; counts, active: [n]. Returns how many were fed, [n].

        A rest shorter than `smallest_chunk` is left.
        """
        done = np.zeros_like(counts)
        for row, stream in enumerate(active.tolist()):
            while (rest := int(counts[row] - done[row])) >= self.smallest_chunk:
                size = min(rest, self.chunk_size)
                self._run_chunk(stream, tokens[row, done[row] : done[row] + size])
                done[row] += size
        return done

    def _run_chunk(self, stream: int, ids: npt.NDArray[np.int64]) -> None:
        """One run of the prefill graph: 1 .. T tokens of one stream."""
        backend, position = self._loaded(), int(self._position[stream])
        backend.logits[stream, 0] = np.nan  # a run that has reached its end overwrites it
        self._chunk = (stream, position, ids)
        try:
            backend.run_chunk(stream, ids, position)
        finally:
            self._settle_chunk()

    def _settle_chunk(self) -> None:
        """Count the tokens of a chunk that has run, whatever came after it; give up a stream whose chunk has not.

        Unlike a step, a chunk overwrites tokens that it would read again. So one that was cut short cannot be
        repeated, and an interrupt between the run and its bookkeeping must not lose that it has run.
        """
        if self._chunk is None or self._backend is None:
            return
        stream, position, ids = self._chunk
        if np.isnan(self._backend.logits[stream, 0]):
            self._damaged.add(stream)
        else:
            slots = np.arange(position, position + ids.size) % self.capacity
            self._recent_ids[stream, slots] = ids
            self._position[stream] = position + ids.size
        self._chunk = None

    def _check_room(self, active: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> None:
        limit = self._manifest.stream.position_limit
        for position, count in zip(self._position[active].tolist(), counts.tolist(), strict=True):
            if position + count > limit:
                raise UsageError(
                    problem(
                        "position",
                        received=f"{position} and {count} more tokens",
                        expected=f"at most {limit} tokens in a stream",
                        fix="reset the stream",
                    )
                )
