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

from sinkrt.backends import load_backend
from sinkrt.contract import Manifest, check_files, load_manifest
from sinkrt.errors import UsageError, problem
from sinkrt.sampler import Sampler, SamplingParams
from sinkrt.state import read_state, save_state

if TYPE_CHECKING:
    from sinkrt.text import Tokenizer


class Session:
    """B streams over one bundle. Not thread-safe; use one session a thread. Make one with `Session.load`."""

    def __init__(self, bundle: Path, manifest: Manifest, backend: str, threads: int | None) -> None:
        self._bundle = bundle
        self._manifest = manifest
        self._backend = load_backend(backend, bundle, manifest, threads)
        self._position = np.zeros(manifest.stream.batch, dtype=np.int64)
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
    def position(self) -> npt.NDArray[np.int64]:
        """int64 [B], a copy: how many tokens each stream has taken, which is the next token's position."""
        return self._position.copy()

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer.

        Raises: UsageError if the bundle has none.
        """
        if self._tokenizer is None:
            from sinkrt.text import Tokenizer

            self._tokenizer = Tokenizer.load(self._bundle, self._manifest)
        return self._tokenizer

    @property
    def buffers(self) -> dict[str, np.ndarray]:
        """Every buffer of the session by tensor name, for inspection: their addresses never change."""
        backend = self._backend
        return {"ids": backend.ids, "position": backend.position, "logits": backend.logits, **backend.states}

    def step(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Feed one token to each stream.

        ids: int [B]. Returns: logits float32 [B, vocab] of the next token; the array is reused by the next call.

        Raises: UsageError for a wrong shape, type or id; BackendError if the step failed (no position advances).
        """
        return self._run(self._checked(ids, (self.batch,)))

    def prefill(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Feed N >= 1 tokens to each stream.

        ids: int [B, N], or [N] if B is 1. Returns: logits float32 [B, vocab] after the last token; the array is
        reused by the next call.

        Raises: UsageError, before any token is fed; BackendError.
        """
        array = np.asarray(ids)
        if array.ndim == 1 and self.batch == 1:
            array = array[None, :]
        if array.ndim == 2 and array.shape[1] == 0:
            raise UsageError(problem("prompt", received="no tokens", expected="at least one", fix="give some text"))
        tokens = self._checked(array, (self.batch, array.shape[1] if array.ndim == 2 else 1))
        for column in tokens.T:
            logits = self._run(column)
        return logits

    def reset(self) -> None:
        """Forget everything: all streams start again at position 0."""
        for state in self._backend.states.values():
            state.fill(0)
        self._position.fill(0)

    def save_state(self, path: str | Path) -> None:
        """Write sinks, window and position to a safetensors file, atomically.

        Raises: UsageError if it cannot be written.
        """
        save_state(Path(path), self._manifest, self._backend.states, self._position)

    def load_state(self, path: str | Path) -> None:
        """Go on where `save_state` was called, with the very same bits. A failed load changes nothing.

        Raises: StateError if the file is truncated, of another version or of another bundle.
        """
        states, position = read_state(Path(path), self._manifest)
        for name, state in self._backend.states.items():
            state[...] = states[name]
        self._position[...] = position

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        ignore_eos: bool = False,
    ) -> Iterator[str]:
        """Feed `prompt` and yield the answer's text piece by piece, whole characters only.

        max_tokens: None goes on until the model ends its text, or for ever with `ignore_eos`.
        The other options are those of `SamplingParams`. The stream goes on: a later call continues it.

        Raises: UsageError if the prompt is empty, B is not 1 or the bundle has no tokenizer.
        """
        if self.batch != 1:
            raise UsageError(problem("generate", received=f"a bundle of {self.batch} streams", expected="batch 1",
                                     fix="use prefill and step, or export with --batch 1"))  # fmt: skip
        tokenizer = self.tokenizer
        params = SamplingParams(temperature, top_k, top_p, repetition_penalty, seed)
        # Validate now, not at the first next(): a generator's body runs late.
        first = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        logits = self.prefill(np.asarray(first, dtype=np.int64)) if first else None
        if logits is None:
            raise UsageError(problem("prompt", received="no tokens", expected="at least one", fix="give some text"))
        return self._pieces(logits, Sampler(params, self._manifest), tokenizer, first, max_tokens, ignore_eos)

    def _pieces(
        self,
        logits: npt.NDArray[np.float32],
        sampler: Sampler,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        max_tokens: int | None,
        ignore_eos: bool,
    ) -> Iterator[str]:
        sampler.observe(prompt)
        decoder = tokenizer.streaming_decoder()
        count = 0
        while max_tokens is None or count < max_tokens:
            token = sampler.sample(logits[0])
            if not ignore_eos and token in self._manifest.model.eos_token_ids:
                break
            logits = self.step([token])
            count += 1
            if piece := decoder.push(token):
                yield piece
        if rest := decoder.flush():
            yield rest

    def close(self) -> None:
        """Release the backend and its memory; the session cannot be used afterwards."""
        del self._backend

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        if (self._position >= self._manifest.stream.position_limit).any():
            raise UsageError(problem("position", received=int(self._position.max()),
                                     expected=f"below {self._manifest.stream.position_limit}",
                                     fix="reset the session"))  # fmt: skip
        backend = self._backend
        backend.ids[:, 0] = ids
        backend.position[...] = self._position
        backend.run()
        self._position += 1
        return backend.logits

    def _checked(self, ids: npt.ArrayLike, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
        array = np.asarray(ids)
        if array.shape != shape or not np.issubdtype(array.dtype, np.integer):
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
