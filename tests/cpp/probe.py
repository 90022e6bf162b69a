"""ctypes declarations of ``probe.cpp``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.cpp.build import onnxruntime_library

_INT64S = ctypes.POINTER(ctypes.c_int64)
ROOM = 1 << 16


class ProbeError(Exception):
    """What the C++ side said."""


class Probe:
    """The library of `probe.cpp`."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in ("sample", "fingerprint", "manifest", "check", "encode", "decode", "stream", "steps", "load_state"):
            getattr(self._library, f"probe_{name}").restype = ctypes.c_int64
        self._library.probe_error.restype = ctypes.c_char_p
        self._library.probe_tokenizer.restype = ctypes.c_void_p

    def call(self, name: str, *arguments: object) -> int:
        """Raises: ProbeError."""
        result = int(getattr(self._library, f"probe_{name}")(*arguments))
        if result < 0:
            raise ProbeError(self._library.probe_error().decode())
        return result

    def sample(
        self,
        logits: np.ndarray,
        recent: np.ndarray,
        position: int,
        temperature: float,
        top_k: int,
        top_p: float,
        penalty: float,
        seed: int,
    ) -> int:
        return self.call(
            "sample",
            logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            ctypes.c_int64(logits.size),
            recent.ctypes.data_as(_INT64S),
            ctypes.c_int64(recent.size),
            ctypes.c_int64(position),
            ctypes.c_double(temperature),
            ctypes.c_int64(top_k),
            ctypes.c_double(top_p),
            ctypes.c_double(penalty),
            ctypes.c_uint64(seed),
        )

    def fingerprint(self, bundle: Path) -> str:
        out = ctypes.create_string_buffer(64)
        self.call("fingerprint", str(bundle).encode(), out)
        return out.raw.decode()

    def manifest(self, bundle: Path) -> str:
        """The manifest's text as C++ writes it."""
        room = 16 * ROOM
        out = ctypes.create_string_buffer(room)
        size = self.call("manifest", str(bundle).encode(), out, ctypes.c_int64(room))
        assert size <= room
        return out.raw[:size].decode()

    def check(self, bundle: Path) -> None:
        """Read the manifest and compare files and graphs with it."""
        self.call("check", str(bundle).encode())

    def steps(self, bundle: Path, prompt: np.ndarray, count: int, state: Path, *, ignore_eos: bool) -> list[list[int]]:
        """Ids of each stream: `count` greedy ones at once after `prompt`, int64 [B, N]; then the state is saved."""
        batch, length = prompt.shape
        ids, counts = np.zeros((batch, count), dtype=np.int64), np.zeros(batch, dtype=np.int64)
        self.call(
            "steps",
            str(bundle).encode(),
            str(onnxruntime_library()).encode(),
            prompt.ctypes.data_as(_INT64S),
            ctypes.c_int64(length),
            ctypes.c_int64(count),
            int(ignore_eos),
            ids.ctypes.data_as(_INT64S),
            counts.ctypes.data_as(_INT64S),
            str(state).encode(),
        )
        return [row[:n].tolist() for row, n in zip(ids, counts, strict=True)]

    def load_state(self, bundle: Path, state: Path) -> None:
        """Load a bundle, and a saved state into it."""
        self.call("load_state", str(bundle).encode(), str(onnxruntime_library()).encode(), str(state).encode())

    def tokenizer(self, path: Path) -> CppTokenizer:
        """Raises: ProbeError."""
        handle = self._library.probe_tokenizer(str(path).encode())
        if not handle:
            raise ProbeError(self._library.probe_error().decode())
        return CppTokenizer(self, ctypes.c_void_p(handle))


class CppTokenizer:
    """A `sinkrt::Tokenizer`."""

    def __init__(self, probe: Probe, handle: ctypes.c_void_p) -> None:
        self._probe, self._handle = probe, handle

    def __del__(self) -> None:
        self._probe._library.probe_tokenizer_free(self._handle)

    def encode(self, text: str | bytes, mode: int = 0) -> list[int]:
        """mode: 0 without, 1 with what begins texts, 2 inside a stream, 3 as a stream's beginning."""
        data = text if isinstance(text, bytes) else text.encode()
        out = np.empty(ROOM, dtype=np.int64)
        count = self._probe.call(
            "encode",
            self._handle,
            data,
            ctypes.c_int64(len(data)),
            mode,
            out.ctypes.data_as(_INT64S),
            ctypes.c_int64(ROOM),
        )
        assert count <= ROOM
        ids: list[int] = out[:count].tolist()
        return ids

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        return self._bytes("decode", ids, int(keep_special)).decode()

    def stream(self, ids: Sequence[int], after: Sequence[int] = ()) -> list[str]:
        """The piece of each id, and what `flush` gives. after: ids that are in the stream already."""
        pieces = self._bytes("stream", [*after, *ids], ctypes.c_int64(len(after)))
        return [piece.decode() for piece in pieces.split(b"\xff")]

    def _bytes(self, name: str, ids: Sequence[int], *more: object) -> bytes:
        array = np.asarray(ids, dtype=np.int64)
        out = ctypes.create_string_buffer(16 * ROOM)
        size = self._probe.call(
            name,
            self._handle,
            array.ctypes.data_as(_INT64S),
            ctypes.c_int64(array.size),
            *more,
            out,
            ctypes.c_int64(16 * ROOM),
        )
        return out.raw[:size]
