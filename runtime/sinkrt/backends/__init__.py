"""Backends: what executes a bundle's graphs."""

from __future__ import annotations

from pathlib import Path

from sinkrt.backends.base import Backend
from sinkrt.contract import Manifest
from sinkrt.errors import BackendError, UsageError, problem

BACKENDS = ("ort", "ort-cuda", "tensorrt")


def load_backend(name: str, bundle: Path, manifest: Manifest, threads: int | None) -> Backend:
    """Load the decode graph of a bundle and allocate every buffer.

    Raises: UsageError for an unknown name; BackendError if it cannot run here.
    """
    if name == "ort":
        from sinkrt.backends.ort import OrtBackend

        return OrtBackend(bundle, manifest, threads)
    if name in BACKENDS:
        raise BackendError(
            problem("backend", received=f"'{name}', which this version does not have yet", expected="ort",
                    fix="pass --backend ort")
        )  # fmt: skip
    raise UsageError(problem("backend", received=f"'{name}'", expected=" | ".join(BACKENDS), fix="choose one of them"))
