"""Backends: what executes a bundle's graphs. A new one is a class that implements `Backend`, and a line in LOADERS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sinkrt.backends.base import Backend, check_graphs
from sinkrt.contract import Manifest
from sinkrt.contract.constants import CPU
from sinkrt.errors import BackendError, UsageError, problem

Loader = Callable[[Path, Manifest, int | None, bool | None, bool], Backend]
"""Loads graphs and allocates buffers: of a bundle folder, its manifest, threads, repack_prefill and repack_decode
(`Session.load`)."""


def _load_ort(
    bundle: Path, manifest: Manifest, threads: int | None, repack_prefill: bool | None, repack_decode: bool
) -> Backend:
    _check_standard("ort", manifest, or_cpu_library=True)
    from sinkrt.backends.ort import OrtBackend

    return OrtBackend(bundle, manifest, threads, repack_prefill, repack_decode=repack_decode)


def _load_ort_cuda(
    bundle: Path, manifest: Manifest, threads: int | None, _repack_prefill: bool | None, _repack_decode: bool
) -> Backend:
    _check_standard("ort-cuda", manifest)
    from sinkrt.backends.ort_cuda import load_on_gpu

    return load_on_gpu(bundle, manifest, threads)


def _load_tensorrt(
    bundle: Path, manifest: Manifest, _threads: int | None, _repack_prefill: bool | None, _repack_decode: bool
) -> Backend:
    from sinkrt.backends.tensorrt import TensorrtBackend

    return TensorrtBackend(bundle, manifest)


LOADERS: dict[str, Loader] = {"ort": _load_ort, "ort-cuda": _load_ort_cuda, "tensorrt": _load_tensorrt}
"""Backends by name. Each imports its library only when it is called."""

BACKENDS = tuple(LOADERS)
"""Names that ``--backend`` takes."""


def check_backend(name: str) -> None:
    """Refuse an unknown backend early, before gigabytes are read.

    Raises: UsageError.
    """
    if name not in LOADERS:
        raise UsageError(
            problem("backend", received=f"'{name}'", expected=" | ".join(LOADERS), fix="choose one of them")
        )


def load_backend(
    name: str,
    bundle: Path,
    manifest: Manifest,
    threads: int | None,
    repack_prefill: bool | None = None,
    repack_decode: bool = True,
) -> Backend:
    """Load the graphs of a bundle and allocate every buffer.

    Raises: UsageError as `check_backend`; BackendError if the backend is not installed or there is no GPU for it;
    BundleError if the graph is not what a backend runs.
    """
    check_backend(name)
    check_graphs(manifest)
    return LOADERS[name](bundle, manifest, threads, repack_prefill, repack_decode)


def _check_standard(name: str, manifest: Manifest, *, or_cpu_library: bool = False) -> None:
    """Make sure that the graphs have standard operators only: ONNX Runtime has no plugin. or_cpu_library: or its nodes.

    Raises: BackendError.
    """
    if manifest.target == CPU and not or_cpu_library:
        raise BackendError(
            problem(
                f"backend '{name}'",
                received="a bundle for the CPU library",
                expected="standard operators",
                fix="pass --backend ort, or export with --target onnx",
            )
        )
    if manifest.has_tensorrt_plugin:
        raise BackendError(
            problem(
                f"backend '{name}'",
                received="a bundle whose graphs need the TensorRT plugin",
                expected="standard operators",
                fix="pass --backend tensorrt, or export with --target onnx",
            )
        )
