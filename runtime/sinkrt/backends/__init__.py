"""Backends: what executes a bundle's graphs."""

from __future__ import annotations

from pathlib import Path

from sinkrt.backends.base import Backend, check_graphs
from sinkrt.contract import Manifest
from sinkrt.errors import BackendError, UsageError, problem

BACKENDS = ("ort", "ort-cuda", "tensorrt")


def check_backend(name: str) -> None:
    """Tell early, before gigabytes are read, that a backend cannot be had.

    Raises: UsageError for an unknown name; BackendError for one that this version does not have.
    """
    if name not in BACKENDS:
        raise UsageError(
            problem("backend", received=f"'{name}'", expected=" | ".join(BACKENDS), fix="choose one of them")
        )
    if name != "ort":
        raise BackendError(
            problem("backend", received=f"'{name}', which is planned but not in this version",
                    expected="ort (ONNX Runtime on the CPU)", fix="leave --backend out or pass ort")
        )  # fmt: skip


def load_backend(
    name: str, bundle: Path, manifest: Manifest, threads: int | None, repack_prefill: bool | None = None
) -> Backend:
    """Load the graphs of a bundle and allocate every buffer.

    Raises: UsageError, BackendError as `check_backend`; BundleError if the graph is not what a backend runs.
    """
    check_backend(name)
    if manifest.plugin_abi is not None:
        raise BackendError(
            problem(f"backend '{name}'", received="a bundle whose graphs need the TensorRT plugin",
                    expected="standard operators", fix="export with --target onnx, or with --target tensorrt --native")
        )  # fmt: skip
    check_graphs(manifest)
    from sinkrt.backends.ort import OrtBackend

    return OrtBackend(bundle, manifest, threads, repack_prefill)
