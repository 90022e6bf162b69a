"""One stream in a safetensors file: what `sinkrt.state` does for all streams of a session.

A file holds a `StreamCopy`: its states without the batch axis, window rings perhaps without the rows that no token has
been written to, ``recent_ids`` int64 [C], ``logits`` float32 [vocab] and ``position`` int64 [1]; besides, ``pending``
int64 [N], ids that the stream is to be fed before anything else. Its metadata name the format, its version and the
bundle's fingerprint. Only the file's owner may read it.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sinkrt.contract import Manifest
from sinkrt.contract.constants import STATE_VERSION, STREAM_FORMAT
from sinkrt.errors import StateError, problem
from sinkrt.files import replacing
from sinkrt.graph_runner import StreamCopy, window_states
from sinkrt.state import check_range, read_tensors, write_safetensors


def save_stream(path: Path, manifest: Manifest, copy: StreamCopy, pending: npt.NDArray[np.int64] | None = None) -> None:
    """Write `copy` to `path`, whole or not at all. pending: int64 [N], None: no ids.

    Raises: OSError.
    """
    tensors = {
        **copy.states,
        "position": np.array([copy.position], np.int64),
        "pending": np.zeros(0, np.int64) if pending is None else pending,
        "recent_ids": copy.recent_ids,
        "logits": copy.logits,
    }
    metadata = {"format": STREAM_FORMAT, "version": STATE_VERSION, "fingerprint": manifest.fingerprint}
    with replacing(path) as file:
        if hasattr(os, "fchmod"):  # not on Windows
            os.fchmod(file.fileno(), 0o600)
        write_safetensors(file, tensors, metadata)


def read_stream(path: Path, manifest: Manifest) -> tuple[StreamCopy, npt.NDArray[np.int64]]:
    """Read and check what `save_stream` wrote: the stream, and the ids that are pending.

    Raises: StateError if it is missing, truncated, of another version or of another bundle.
    """
    tensors = read_tensors(path, manifest, STREAM_FORMAT, functools.partial(_other, path))
    stream = manifest.stream
    shapes = {
        **{state.input: (state.shape[1:], state.dtype) for state in manifest.states},
        "position": ((1,), "int64"),
        "pending": (tensors["pending"].shape[:1] if "pending" in tensors else (0,), "int64"),
        "recent_ids": ((stream.capacity,), "int64"),
        "logits": ((manifest.model.vocab_size,), "float32"),
    }
    if tensors.keys() != shapes.keys():
        raise _other(path, f"tensors {sorted(tensors.keys() ^ shapes.keys())[:3]} too many or missing")
    position = int(tensors["position"].flat[0]) if tensors["position"].size else -1
    windows = window_states(manifest)
    for name, (shape, dtype) in shapes.items():
        tensor, wanted = tensors[name], shape
        if name in windows and tensor.ndim > 1 and tensor.shape[1] >= min(position, shape[1]):
            wanted = (shape[0], min(tensor.shape[1], shape[1]), *shape[2:])
        if (tensor.shape, str(tensor.dtype)) != (tuple(wanted), dtype):
            raise _other(path, f"'{name}' of {tensor.dtype} {list(tensor.shape)}")
    check_range("position", tensors["position"], 0, stream.position_limit)
    check_range("pending", tensors["pending"], 0, manifest.model.vocab_size - 1)
    recent = tensors["recent_ids"]
    check_range("recent_ids", recent, -1, manifest.model.vocab_size - 1)
    check_range("recent_ids", recent[:position], 0, manifest.model.vocab_size - 1)
    states = {state.input: tensors[state.input] for state in manifest.states}
    return StreamCopy(states, position, recent, tensors["logits"], windows), tensors["pending"]


def _other(path: Path, reason: str) -> StateError:
    return StateError(
        problem("stream file", received=f"'{path}' ({reason})", expected="a whole one of this bundle", fix="delete it")
    )
