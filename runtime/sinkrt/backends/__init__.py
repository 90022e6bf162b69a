"""Backends: what executes a bundle's graphs."""

from __future__ import annotations

from pathlib import Path

from sinkrt.backends.base import Backend, check_graphs
from sinkrt.contract import Manifest
from sinkrt.errors import BackendError, UsageError, problem

BACKENDS = ("ort", "ort-cuda", "tensorrt")


def check_backend(name: str) -> None:
    """Tell early, before gigabytes are read, that there is no such backend.

    Raises: UsageError.
    """
    if name not in BACKENDS:
        raise UsageError(
            problem("backend", received=f"'{name}'", expected=" | ".join(BACKENDS), fix="choose one of them")
        )


def load_backend(
    name: str, bundle: Path, manifest: Manifest, threads: int | None, repack_prefill: bool | None = None
) -> Backend:
    """Load the graphs of a bundle and allocate every buffer.

    Raises: UsageError as `check_backend`; BackendError if the backend is not installed or there is no GPU for it;
    BundleError if the graph is not what a backend runs.
    """
    check_backend(name)
    check_graphs(manifest)
    if name == "tensorrt":
        from sinkrt.backends.tensorrt import TensorrtBackend

        return TensorrtBackend(bundle, manifest)
    if manifest.plugin_abi is not None:
        raise BackendError(
            problem(
                f"backend '{name}'",
                received="a bundle whose graphs need the TensorRT plugin",
                expected="standard operators",
                fix="pass --backend tensorrt, or export with --target onnx",
            )
        )
    from sinkrt.backends.ort import OrtBackend, load_on_gpu

    if name == "ort-cuda":
        return load_on_gpu(bundle, manifest, threads)
    return OrtBackend(bundle, manifest, threads, repack_prefill)
