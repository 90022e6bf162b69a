"""A decoding session: endless, in constant memory.

    session = Session.load("bundle")
    logits = session.prefill(ids)          # any number of tokens, far past the window too
    while True:
        logits = session.step(pick(logits))

All buffers are allocated by `load`; from token to token nothing grows. Once S + W tokens are fed, the cache holds the
first S and the last W of them (`num_sink_tokens`, `window_size`), exactly as if each had been fed one by one.

Twin of runtime/cpp/include/sinkrt/session.h. Here `StreamTable` keeps the books of the streams, `GraphRunner` runs
the graphs, and `generate` makes text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from sinkrt.answer import AnswerParams
from sinkrt.arguments import integers, token_ids, valid_counts
from sinkrt.backends import check_backend, load_backend
from sinkrt.backends.base import StateArray
from sinkrt.contract import Manifest, check_files, load_manifest
from sinkrt.errors import UsageError, problem
from sinkrt.generate import check_batch, generate
from sinkrt.grammar import GrammarCompiler, grammar_of
from sinkrt.graph_runner import GraphRunner, StreamCopy, smallest_chunk, window_states
from sinkrt.rewind import Rewinder
from sinkrt.sampler import SamplingParams
from sinkrt.speculate import Speculation, load_speculation
from sinkrt.state import read_state, save_state
from sinkrt.stream_table import StreamTable
from sinkrt.text import Tokenizer

__all__ = ["MAX_THREADS", "Session", "StreamCopy"]

MAX_THREADS = 1024
"""More than any machine of today has cores; ONNX Runtime starts as many as it is asked for, and aborts if it cannot."""


class Session:
    """Session of B streams over one bundle. Make one with `Session.load`; use one session a thread.

    Whatever interrupts a call (an error, Ctrl-C), the session stays consistent: `position` says how many tokens
    count, and a token that was cut short can be fed again. Where it cannot, inside a chunk and in models with recurrent
    states, every call reports that until the stream is reset.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        backend: str,
        threads: int | None,
        repack_prefill: bool | None = None,
        repack_decode: bool = True,
    ) -> None:
        self._bundle = bundle
        self._manifest = manifest
        loaded = load_backend(backend, bundle, manifest, threads, repack_prefill, repack_decode)
        self._table = StreamTable(manifest)
        # None: the session is closed.
        self._runner: GraphRunner | None = GraphRunner(loaded, self._table, manifest.stream.chunk_size, manifest.target)
        self._tokenizer: Tokenizer | None = None
        self._grammars: GrammarCompiler | None = None
        self._threads = threads
        self._speculations: dict[str, Speculation] = {}

    @classmethod
    def load(
        cls,
        path: str | Path,
        backend: str = "ort",
        *,
        threads: int | None = None,
        verify: bool = True,
        repack_prefill: bool | None = None,
        repack_decode: bool = True,
    ) -> Session:
        """Open the bundle folder `path`.

        threads: CPU threads of one operator (None: all physical cores).
        verify: compare every file's SHA-256 with the manifest; False compares sizes only, which is faster.
        repack_prefill: whether prefill gets a copy of the weights for itself, which makes it about a seventh faster;
        None: if memory is plentiful.
        repack_decode: whether steps get one. Without both copies, all of the weights are pages of their file.

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
        return cls(bundle, manifest, backend, threads, repack_prefill, repack_decode)

    # --- facts ---

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self._manifest

    @property
    def batch(self) -> int:
        """B, streams decoded together."""
        return self._manifest.stream.batch

    @property
    def num_sink_tokens(self) -> int:
        """S, first tokens kept forever."""
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
    def chunk_size(self) -> int:
        """T, tokens that one run of the prefill graph takes; 1 if the bundle has none."""
        return self._manifest.stream.chunk_size

    @property
    def smallest_chunk(self) -> int:
        """Tokens from which on one run of the prefill graph is quicker than as many steps.

        A chunk costs the same however few tokens it holds, but for matmuls of the CPU library.
        """
        return smallest_chunk(self.chunk_size, self._manifest.target)

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer, read on first use.

        Raises: UsageError if the bundle has none; BundleError if it is unreadable.
        """
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.load(self._bundle, self._manifest)
        return self._tokenizer

    @property
    def grammars(self) -> GrammarCompiler:
        """Makes grammars ready for the bundle's tokenizer.

        Raises: UsageError, BundleError as `tokenizer`.
        """
        if self._grammars is None:
            self._grammars = GrammarCompiler(self.tokenizer, self._manifest.model.vocab_size)
        return self._grammars

    @property
    def buffers(self) -> dict[str, StateArray]:
        """Every buffer of the session by tensor name, for inspection: their addresses never change."""
        backend = self._loaded().backend
        return {"ids": backend.ids, "position": backend.position, "logits": backend.logits, **backend.states}

    @property
    def not_recorded(self) -> str | None:
        """Reason why steps are not replayed as CUDA graphs, which costs time; None: they are, or there is no GPU.

        Raises: UsageError if the session is closed.
        """
        return self._loaded().backend.not_recorded

    @property
    def position(self) -> npt.NDArray[np.int64]:
        """Tokens that each stream has taken, which is the next token's position: int64 [B], a copy."""
        return self._table.position.copy()

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """Logits float32 [B, vocab] of the token after each stream's last one; the array is reused by the next call.

        A row means nothing while its stream is at position 0.
        """
        return self._loaded().backend.logits

    def recent_ids(self, stream: int = 0) -> npt.NDArray[np.int64]:
        """The last tokens that a stream took, oldest first: int64 [N], N <= C.

        Raises: UsageError for an unknown stream.
        """
        (stream,) = self._table.chosen([stream])
        return self._table.recent(stream)

    # --- tokens in, logits out ---

    def step(self, ids: npt.ArrayLike, streams: Sequence[int] | None = None) -> npt.NDArray[np.float32]:
        """Feed one token to each stream, or to some: the others do not notice.

        ids: int [B], or one for each of `streams`. Returns: logits float32 [B, vocab] of the next token, those of idle
        streams unchanged; the array is reused by the next call.

        Raises: UsageError for a wrong shape, type, id or stream; StateError for a stream that an error has cut short;
        BackendError if the step failed (no position advances).
        """
        active = self._table.chosen(streams)
        tokens = token_ids(ids, (len(active),), self._manifest.model.vocab_size)
        self._table.check_room(active, np.ones(len(active), dtype=np.int64))
        return self._loaded().step(tokens, active)

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
        active = self._table.chosen(streams)
        tokens, counts = self._rows_of_tokens(ids, num_valid, active)
        self._table.check_room(active, counts)
        self._loaded().prefill(tokens, counts, active)
        return self.logits

    # --- drafts ---

    @property
    def bundle(self) -> Path:
        """The bundle's folder."""
        return self._bundle

    @property
    def num_verified(self) -> npt.NDArray[np.int64]:
        """Tokens that `verify` was given and `commit` could still feed, of each stream: int64 [B]."""
        return self._loaded().num_verified()

    def speculation(self, speculate: str) -> Speculation:
        """What guesses tokens for `generate` with this `speculate`, and its `tally` since the session was loaded.

        Raises: as `generate`.
        """
        check_batch(self.batch)
        if speculate not in self._speculations:
            found = load_speculation(self, speculate, self._open_beside)
            self._loaded().verifier(self._manifest)
            self._speculations[speculate] = found
        return self._speculations[speculate]

    def _open_beside(self, bundle: Path) -> Session:
        """Open another bundle, on as many threads."""
        return Session.load(bundle, threads=self._threads)

    def rewinder(self, count: int) -> Rewinder:
        """Make what can take back the last tokens of a session of one stream, up to `count` of them.

        Raises: UsageError for recurrent states, or a window of fewer tokens.
        """
        return Rewinder(self._loaded(), self._table, self._manifest, count)

    @property
    def num_drafts(self) -> int:
        """K, drafted tokens that `verify` takes beside the one before them; 0: the bundle was exported without."""
        return self._manifest.num_drafts

    def verify(
        self,
        ids: npt.ArrayLike,
        num_valid: npt.ArrayLike | None = None,
        streams: Sequence[int] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Compute the logits after each of up to K + 1 tokens, and feed none: `commit` feeds those that are right.

        Arguments as of `prefill`. Returns: float32 [B, K + 1, vocab], which the next call overwrites; entries of other
        streams and behind a stream's tokens mean nothing.

        Raises: as `prefill`; UsageError if the bundle has no graph for it, or for more than K + 1 tokens.
        """
        active = self._table.chosen(streams)
        runner = self._loaded()
        verifier = runner.verifier(self._manifest)
        tokens, counts = self._rows_of_tokens(ids, num_valid, active)
        if tokens.shape[1] > self.num_drafts + 1:
            raise UsageError(
                problem(
                    "tokens to verify",
                    received=tokens.shape[1],
                    expected=f"at most {self.num_drafts + 1}: one, and {self.num_drafts} drafted",
                    fix="verify fewer, or export with a larger --speculate",
                )
            )
        self._table.check_room(active, counts)
        return runner.verify(verifier, tokens, counts, active)

    def commit(self, counts: npt.ArrayLike, streams: Sequence[int] | None = None) -> npt.NDArray[np.float32]:
        """Feed the next counts[i] tokens of what `verify` was given, exactly as if they came by `step`.

        counts: int [B], or one for each of `streams`, 0 .. as many as are left. It may be called several times. The
        others are forgotten when a stream is fed in another way. Returns: logits float32 [B, vocab].

        Raises: UsageError for more tokens than were verified and are left.
        """
        active = self._table.chosen(streams)
        array = np.asarray(integers(counts), dtype=np.int64).reshape(-1)
        if array.size != active.size:
            raise UsageError(
                problem("counts", received=array.size, expected=f"{active.size}, one a stream", fix="give one for each")
            )
        self._loaded().commit(array, active)
        return self.logits

    # --- streams as a whole ---

    def reset(self, streams: Sequence[int] | None = None) -> None:
        """Forget everything: all streams, or some, start again at position 0.

        Raises: UsageError for an unknown stream.
        """
        chosen = self._table.chosen(streams, damaged=True)
        self._loaded().reset(chosen)

    def copy_stream(self, stream: int, *, used_rows: bool = False) -> StreamCopy:
        """Copy one stream out, to go on with later in any stream of this bundle.

        used_rows: leave out the rows of the windows that no token has been written to.

        Raises: UsageError for an unknown stream; StateError for one that an error has cut short.
        """
        (stream,) = self._table.chosen([stream])
        return self._loaded().copy_stream(stream, window_states(self._manifest) if used_rows else frozenset())

    def place_stream(self, stream: int, copy: StreamCopy) -> None:
        """Let `stream` go on where `copy` was taken, with the very same bits; what it held is forgotten.

        Raises: UsageError for an unknown stream or the copy of another bundle's.
        """
        (stream,) = self._table.chosen([stream], damaged=True)
        self._loaded().place_stream(stream, copy)

    def save_state(self, path: str | Path) -> None:
        """Write sinks, window, position, recent ids and logits to a safetensors file, atomically.

        Raises: UsageError if it cannot be written; StateError if an error has cut a stream short.
        """
        self._table.chosen(None)
        save_state(Path(path), self._manifest, self._loaded().kept())

    def load_state(self, path: str | Path) -> None:
        """Go on where `save_state` was called, with the very same bits. A failed load changes nothing.

        Raises: StateError if the file is truncated, of another version or of another bundle.
        """
        runner = self._loaded()
        runner.restore(read_state(Path(path), self._manifest))

    # --- text ---

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
        json_schema: Mapping[str, Any] | bool | str | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        speculate: str | None = None,
    ) -> Iterator[str]:
        """Feed `prompt`, a text or ids, and yield the answer's text piece by piece, whole characters only.

        prompt: None goes on where the stream stands, as after `load_state` in the middle of an answer.
        max_tokens: None goes on until the model ends its text, or forever with `ignore_eos`.
        stop: one or several texts; the answer ends before the first that comes, special tokens included.
        allow_special: the names of special tokens in a prompt of text become those tokens, as in a rendered chat;
        otherwise they are text like any other, and a warning says so.
        json_schema: object, or JSON text, that the answer is made to match; `regex` and `grammar` (Lark or GBNF) are
        other ways to say what it must match. They need llguidance. An answer that max_tokens ends is a part only.
        speculate: what guesses tokens, which are verified several at a time (docs/speculation.md): ``ngram``, what
        followed in the text before; ``draft:DIR``, a smaller model's bundle; None: nothing.
        The other options are those of `SamplingParams`. The prompt is fed at once, each token of the answer before
        the piece that it completes is yielded. The stream goes on: a later call continues it. The token that ends
        a text is not fed.

        Raises: UsageError, before any token is fed, if the prompt is empty, an option is out of range, B is not 1 or
        the bundle has no tokenizer; StateError, BackendError.
        """
        check_batch(self.batch)
        wanted = grammar_of(json_schema, regex, grammar)
        compiled = None if wanted is None else self.grammars.compile(wanted)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        params = AnswerParams(max_tokens, stops, ignore_eos, grammar=compiled)
        sampling = SamplingParams(temperature, top_k, top_p, repetition_penalty, seed)
        speculation = None if speculate is None else self.speculation(speculate)
        recent = self._table.recent_ids[0]
        return generate(self, prompt, sampling, params, recent, allow_special=allow_special, speculation=speculation)

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

    def _rows_of_tokens(
        self, ids: npt.ArrayLike, num_valid: npt.ArrayLike | None, active: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Tokens int64 [n, N] and how many of each row count, [n]."""
        array = integers(ids)
        if array.ndim == 1 and len(active) == 1:
            array = array[None, :]
        if array.size == 0:
            raise UsageError(problem("prompt", received="no tokens", expected="at least one", fix="give some text"))
        width = array.shape[-1] if array.ndim else 1
        tokens = token_ids(array, (len(active), width), self._manifest.model.vocab_size)
        return tokens, valid_counts(num_valid, len(active), width)

    # --- end ---

    def close(self) -> None:
        """Release the backend and its memory; the session cannot be used afterwards. Closing twice is fine."""
        self._runner = None
        if self._grammars is not None:
            self._grammars.close()
        for speculation in self._speculations.values():
            speculation.drafter.close()
        if self._tokenizer is not None:
            self._tokenizer.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def _loaded(self) -> GraphRunner:
        if self._runner is None:
            raise UsageError(problem("session", received="a closed one", expected="an open one", fix="load it again"))
        return self._runner
