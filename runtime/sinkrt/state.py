"""Save and load a session's stream state as safetensors.

A file holds every state tensor and `position` (int64 [B]); its metadata name the format's version and the bundle's
fingerprint, so that a state can never be continued with other weights or another cache geometry.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sinkrt.contract import Manifest
from sinkrt.errors import StateError, UsageError, problem

FORMAT = "sinkrt-state"
VERSION = "1"


def save_state(path: Path, manifest: Manifest, states: Mapping[str, np.ndarray], position: np.ndarray) -> None:
    """Write the state to `path`, whole or not at all: a crash leaves the file that was there before.

    Raises: UsageError if the file cannot be written.
    """
    metadata = {"format": FORMAT, "version": VERSION, "fingerprint": manifest.fingerprint}
    try:
        with _replaced_file(path) as temporary:
            save_file({**states, "position": position}, temporary, metadata=metadata)
    except OSError as error:
        raise UsageError(
            problem("state file", received=f"'{path}' ({error.strerror or error})",
                    expected="a file that can be written", fix="choose another path")
        ) from error  # fmt: skip


def read_state(path: Path, manifest: Manifest) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Read and check a state file: ({input name: array}, position int64 [B]).

    Raises: StateError if it is missing, truncated, of another version or of another bundle.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            _check_metadata(path, metadata, manifest)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StateError(
            problem("state file", received=f"'{path}' ({reason})", expected="a whole file that save_state wrote",
                    fix="use another save")
        ) from error  # fmt: skip
    wanted = {state.input: (state.shape, state.dtype) for state in manifest.states}
    wanted["position"] = ((manifest.stream.batch,), "int64")
    found = {name: (tensor.shape, str(tensor.dtype)) for name, tensor in tensors.items()}
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise StateError(
                problem(f"state '{name}'", received=found.get(name, "nothing"),
                        expected=str(wanted.get(name, "nothing")), fix="use a state that this bundle saved")
            )  # fmt: skip
    position = tensors.pop("position")
    if (position < 0).any() or (position >= manifest.stream.position_limit).any():
        raise StateError(
            problem("state position", received=position.tolist(),
                    expected=f"0 .. {manifest.stream.position_limit - 1}", fix="use another save")
        )  # fmt: skip
    return tensors, position


def _check_metadata(path: Path, metadata: Mapping[str, str], manifest: Manifest) -> None:
    checks = (
        ("format", FORMAT, "use a file that save_state wrote"),
        ("version", VERSION, "use the sinkexport version that saved it"),
        ("fingerprint", manifest.fingerprint, "it is of another model, window or batch: use the bundle that saved it"),
    )
    for key, wanted, fix in checks:
        found = metadata.get(key, "nothing")
        if found != wanted:
            raise StateError(
                problem(f"state file '{path.name}': {key}", received=found[:16], expected=wanted[:16], fix=fix)
            )


@contextlib.contextmanager
def _replaced_file(path: Path) -> Iterator[Path]:
    """A temporary file in the same folder that takes the place of `path` once it has reached the disk."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
