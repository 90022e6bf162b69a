"""A decoding session: endless, in constant memory.

    session = Session.load("bundle")
    logits = session.prefill(ids)          # any number of tokens, far past the window too
    while True:
        logits = session.step(pick(logits))

All buffers are allocated by `load`; from token to token nothing grows. After `num_sink_tokens + window_size` tokens
the cache holds the first S and the last W of them, exactly as if each had been fed one by one (they are).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sinkrt.backends import check_backend, load_backend
from sinkrt.backends.base import Backend
from sinkrt.contract import Manifest, check_files, load_manifest
from sinkrt.errors import UsageError, problem
from sinkrt.sampler import Sampler, SamplingParams
from sinkrt.state import read_state, save_state

if TYPE_CHECKING:
    from sinkrt.text import Tokenizer


class Session:
    """B streams over one bundle. Make one with `Session.load`; use one session a thread.

    Whatever interrupts a call (an error, Ctrl-C), the session stays consistent: `position` tells how many tokens
    count, and a token that was cut short can be fed again.
    """

    def __init__(self, bundle: Path, manifest: Manifest, backend: str, threads: int | None) -> None:
        stream = manifest.stream
        self._bundle = bundle
        self._manifest = manifest
        self._backend: Backend | None = load_backend(backend, bundle, manifest, threads)
        self._position = np.zeros(stream.batch, dtype=np.int64)
        # The last C ids of each stream, that of token t at t mod C; -1: none. For the repetition penalty.
        self._recent_ids = np.full((stream.batch, stream.capacity), -1, dtype=np.int64)
        self._streams = np.arange(stream.batch)
        self._tokenizer: Tokenizer | None = None

    @classmethod
    def load(
        cls, path: str | Path, backend: str = "ort", *, threads: int | None = None, verify: bool = True
    ) -> Session:
        """Open the bundle folder `path`.

        threads: CPU threads of one operator (None: all physical cores).
        verify: compare every file's SHA-256 with the manifest; False compares sizes only, which is faster.

        Raises: BundleError if the bundle is missing, corrupt or newer; BackendError; UsageError.
        """
        if threads is not None and threads < 1:
            raise UsageError(problem("threads", received=threads, expected=">= 1", fix="leave it out for all cores"))
        check_backend(backend)
        bundle = Path(path)
        manifest = load_manifest(bundle)
        check_files(bundle, manifest, hashes=verify)
        return cls(bundle, manifest, backend, threads)

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
    def buffers(self) -> dict[str, np.ndarray]:
        """Every buffer of the session by tensor name, for inspection: their addresses never change."""
        backend = self._loaded()
        return {"ids": backend.ids, "position": backend.position, "logits": backend.logits, **backend.states}

    def step(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Feed one token to each stream.

        ids: int [B]. Returns: logits float32 [B, vocab] of the next token; the array is reused by the next call.

        Raises: UsageError for a wrong shape, type or id; BackendError if the step failed (no position advances).
        """
        tokens = self._checked(ids, (self.batch,))
        self._check_room(1)
        return self._run(tokens)

    def prefill(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Feed N >= 1 tokens to each stream.

        ids: int [B, N], or [N] if B is 1. Returns: logits float32 [B, vocab] after the last token; the array is
        reused by the next call.

        Raises: UsageError, before any token is fed; BackendError, with `position` at the first token that failed.
        """
        array = _integers(ids)
        if array.ndim == 1 and self.batch == 1:
            array = array[None, :]
        if array.size == 0:
            raise UsageError(problem("prompt", received="no tokens", expected="at least one", fix="give some text"))
        tokens = self._checked(array, (self.batch, array.shape[-1] if array.ndim else 1))
        self._check_room(tokens.shape[1])
        for column in tokens.T:
            logits = self._run(column)
        return logits

    def reset(self) -> None:
        """Forget everything: all streams start again at position 0."""
        # The position first: at 0 every slot is masked, so an interrupt cannot leave a stream that is half there.
        self._position.fill(0)
        self._recent_ids.fill(-1)
        for state in self._loaded().states.values():
            state.fill(0)

    def save_state(self, path: str | Path) -> None:
        """Write sinks, window, position and recent ids to a safetensors file, atomically.

        Raises: UsageError if it cannot be written.
        """
        streams = {"position": self._position, "recent_ids": self._recent_ids}
        save_state(Path(path), self._manifest, {**self._loaded().states, **streams})

    def load_state(self, path: str | Path) -> None:
        """Go on where `save_state` was called, with the very same bits. A failed load changes nothing.

        Raises: StateError if the file is truncated, of another version or of another bundle.
        """
        states = self._loaded().states
        tensors = read_state(Path(path), self._manifest)
        self._position.fill(0)  # as in `reset`; the file's position comes last
        for name, state in states.items():
            state[...] = tensors[name]
        self._recent_ids[...] = tensors["recent_ids"]
        self._position[...] = tensors["position"]

    def generate(
        self,
        prompt: str | Sequence[int] | npt.NDArray[np.integer],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        ignore_eos: bool = False,
    ) -> Iterator[str]:
        """Feed `prompt`, a text or ids, and yield the answer's text piece by piece, whole characters only.

        max_tokens: None goes on until the model ends its text, or for ever with `ignore_eos`.
        The other options are those of `SamplingParams`. The prompt is fed at once, each token of the answer before
        the piece that it completes is yielded. The stream goes on: a later call continues it. The token that ends
        a text is not fed.

        Raises: UsageError if the prompt is empty or an option is out of range, before any token is fed, and if B
        is not 1 or the bundle has no tokenizer; BackendError.
        """
        if self.batch != 1:
            raise UsageError(problem("generate", received=f"a bundle of {self.batch} streams", expected="batch 1",
                                     fix="use prefill and step, or export with --batch 1"))  # fmt: skip
        if max_tokens is not None and max_tokens < 1:
            raise UsageError(problem("max_tokens", received=max_tokens, expected=">= 1", fix="leave it out for all"))
        params = SamplingParams(temperature, top_k, top_p, repetition_penalty, seed)
        tokenizer = self.tokenizer
        ids: npt.ArrayLike = prompt
        if isinstance(prompt, str):
            ids = tokenizer.encode_next(prompt) if self._position[0] else tokenizer.encode(prompt)
        # Fed here, not at the first next(): a generator's body runs late, and so would its errors.
        logits = self.prefill(ids)
        sampler = Sampler(params, self._manifest.model.vocab_size)
        return self._pieces(logits, sampler, tokenizer, max_tokens, ignore_eos)

    def _pieces(
        self,
        logits: npt.NDArray[np.float32],
        sampler: Sampler,
        tokenizer: Tokenizer,
        max_tokens: int | None,
        ignore_eos: bool,
    ) -> Iterator[str]:
        decoder = tokenizer.streaming_decoder()
        count = 0
        while max_tokens is None or count < max_tokens:
            token = sampler.sample(logits[0], self._recent_ids[0], int(self._position[0]))
            if not ignore_eos and token in self._manifest.model.eos_token_ids:
                break
            logits = self.step([token])
            count += 1
            if piece := decoder.push(token):
                yield piece
        if rest := decoder.flush():
            yield rest

    def close(self) -> None:
        """Release the backend and its memory; the session cannot be used afterwards. Closing twice is fine."""
        self._backend = None

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

    def _run(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """One token a stream, checked by the caller. ids: int64 [B]."""
        backend = self._loaded()
        backend.ids[:, 0] = ids
        backend.position[...] = self._position
        backend.run()
        self._recent_ids[self._streams, self._position % self.capacity] = ids
        # Last: until here the token does not count, and running its position again overwrites all that it wrote.
        self._position += 1
        return backend.logits

    def _check_room(self, num_tokens: int) -> None:
        limit = self._manifest.stream.position_limit
        if int(self._position.max()) + num_tokens > limit:
            raise UsageError(
                problem("position", received=f"{int(self._position.max())} and {num_tokens} more tokens",
                        expected=f"at most {limit} tokens in a stream", fix="reset the session")
            )  # fmt: skip

    def _checked(self, ids: npt.ArrayLike, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
        array = _integers(ids)
        if array.shape != shape:
            raise UsageError(
                problem("ids", received=f"{array.dtype} {list(array.shape)}", expected=f"integers {list(shape)}",
                        fix="give each of the bundle's streams its tokens")
            )  # fmt: skip
        vocab_size = self._manifest.model.vocab_size
        outside = array[(array < 0) | (array >= vocab_size)]
        if outside.size:
            raise UsageError(
                problem("token id", received=int(outside[0]), expected=f"0 .. {vocab_size - 1}",
                        fix="use the tokenizer of this model")
            )  # fmt: skip
        return array.astype(np.int64, copy=False)


def _integers(ids: npt.ArrayLike) -> np.ndarray:
    """An array of integers, of any shape; an empty list counts as one.

    Raises: UsageError.
    """
    try:
        array = np.asarray(ids)
    except ValueError:  # rows of different lengths
        received = "rows of different lengths"
    else:
        if array.size == 0 or np.issubdtype(array.dtype, np.integer):
            return array
        received = f"{array.dtype} {list(array.shape)}"
    raise UsageError(
        problem("ids", received=received, expected="an array of integers", fix="convert them to token ids")
    )
