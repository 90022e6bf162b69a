"""Save and load a session's stream as safetensors.

A file holds every state tensor by its input name, and besides:

- `position`, int64 [B]: tokens taken.
- `recent_ids`, int64 [B, C]: ids of the last C tokens, that of token t at t mod C, -1 where there is none. Sampling
  looks back at them.
- `logits`, float32 [B, vocab]: of the token that comes next. An answer can go on where it was cut short.

Its metadata name the format, its version and the bundle's fingerprint. So a stream is never continued with other
weights or another cache geometry. Twin of runtime/cpp/include/sinkrt/state.h.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from sinkrt.backends.base import StateArray
from sinkrt.contract import Manifest
from sinkrt.contract.constants import SAFETENSORS_DTYPES, STATE_FORMAT, STATE_VERSION
from sinkrt.errors import StateError, UsageError, problem
from sinkrt.files import check_replaceable, is_special, replacing


def state_tensors(manifest: Manifest) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor of a state file, by name."""
    stream = manifest.stream
    return {
        **{state.input: (state.shape, state.dtype) for state in manifest.states},
        "position": ((stream.batch,), "int64"),
        "recent_ids": ((stream.batch, stream.capacity), "int64"),
        "logits": ((stream.batch, manifest.model.vocab_size), "float32"),
    }


def save_state(path: Path, manifest: Manifest, tensors: Mapping[str, StateArray]) -> None:
    """Write the tensors of `state_tensors` to `path`, whole or not at all: a crash leaves the file that was there.

    Written straight from the buffers, so saving needs no memory to speak of; tensors on a device come one by one.

    Raises: UsageError if the file cannot be written.
    """
    metadata = {"format": STATE_FORMAT, "version": STATE_VERSION, "fingerprint": manifest.fingerprint}
    try:
        with replacing(path) as file:
            write_safetensors(file, tensors, metadata)
    except OSError as error:
        raise _unwritable(path, error) from error


def check_state_target(path: Path, option: str) -> None:
    """Make sure that `save_state` can write `path`: before hours of streaming, not after them.

    option: what the user gave it with, for the message.

    Raises: UsageError.
    """
    try:
        check_replaceable(path)
    except OSError as error:
        raise _unwritable(path, error, option) from error


def _unwritable(path: Path, error: OSError, what: str = "state file") -> UsageError:
    return UsageError(
        problem(
            what,
            received=f"'{path}' ({error.strerror or error})",
            expected="a file that can be written",
            fix="choose another path",
        )
    )


def read_state(path: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """Read and check a state file: the tensors of `state_tensors`.

    Raises: StateError if it is missing, truncated, of another version or of another bundle.
    """

    def unreadable(reason: str) -> StateError:
        what, wanted = f"'{path}' ({reason})", "a whole file that save_state wrote"
        return StateError(problem("state file", received=what, expected=wanted, fix="use another save"))

    tensors = read_tensors(path, manifest, STATE_FORMAT, unreadable)
    wanted = state_tensors(manifest)
    found = {name: (tensor.shape, str(tensor.dtype)) for name, tensor in tensors.items()}
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise StateError(
                problem(
                    f"state '{name}'",
                    received=found.get(name, "nothing"),
                    expected=str(wanted.get(name, "nothing")),
                    fix="use a state that this bundle saved",
                )
            )
    check_range("position", tensors["position"], 0, manifest.stream.position_limit)
    check_range("recent_ids", tensors["recent_ids"], -1, manifest.model.vocab_size - 1)
    for position, ids in zip(tensors["position"].tolist(), tensors["recent_ids"], strict=True):
        # Token t is at t mod C: the first `position` entries of a ring that is not full yet, then all of them.
        check_range("recent_ids", ids[:position], 0, manifest.model.vocab_size - 1)
    return tensors


def read_tensors(
    path: Path, manifest: Manifest, form: str, unreadable: Callable[[str], StateError]
) -> dict[str, np.ndarray]:
    """All tensors of a file of this form and version, and of this bundle.

    unreadable: the error for a reason why it cannot be read.

    Raises: StateError.
    """
    try:
        if is_special(path):
            raise OSError("a device, pipe or socket, no file")
        with safe_open(path, framework="numpy") as file:
            _check_metadata(path, file.metadata() or {}, manifest, form)
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise unreadable(str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def _check_metadata(path: Path, metadata: Mapping[str, str], manifest: Manifest, form: str) -> None:
    checks = (
        ("format", form, "use a file that save_state wrote"),
        ("version", STATE_VERSION, "use the sinkexport version that saved it"),
        ("fingerprint", manifest.fingerprint, "it is of another model, window or batch: use the bundle that saved it"),
    )
    for key, wanted, fix in checks:
        found = metadata.get(key, "nothing")
        if found != wanted:
            raise StateError(
                problem(f"state file '{path.name}': {key}", received=found[:16], expected=wanted[:16], fix=fix)
            )


def check_range(name: str, values: np.ndarray, low: int, high: int) -> None:
    """Make sure that all values of a tensor are from `low` to `high`.

    Raises: StateError.
    """
    outside = values[(values < low) | (values > high)]
    if outside.size:
        raise StateError(
            problem(f"state '{name}'", received=int(outside[0]), expected=f"{low} .. {high}", fix="use another save")
        )


def write_safetensors(file: BinaryIO, tensors: Mapping[str, StateArray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file. The format's own writer copies every tensor first; this one does not.

    Layout: uint64 little-endian header size, JSON header padded with spaces to 8 bytes, tensors without gaps.
    """
    # Wide elements first, so that every tensor is aligned to its element.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name, tensor in ordered:
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for _, tensor in ordered:
        file.write(np.asarray(tensor).reshape(-1).view(np.uint8).data)
