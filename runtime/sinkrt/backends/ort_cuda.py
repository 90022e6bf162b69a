"""ONNX Runtime on a GPU: the backend of `sinkrt.backends.ort`, with buffers in device memory and CUDA graphs."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from sinkrt.backends.cuda import Cuda, Staged
from sinkrt.backends.ort import OrtBackend
from sinkrt.backends.ort_graph import first_line
from sinkrt.contract import Manifest, TensorSpec
from sinkrt.errors import BackendError, BundleError, problem


class CudaDevice:
    """The first GPU and its memory: implements `Device`.

    graphs: record each binding as a CUDA graph; ONNX Runtime refuses that if a node has no kernel on the GPU.
    """

    provider = "CUDAExecutionProvider"

    def __init__(self, cuda: Cuda, *, graphs: bool) -> None:
        self._cuda, self._graphs = cuda, graphs
        options = {
            "device_id": "0",
            "enable_cuda_graph": "1" if graphs else "0",
            "arena_extend_strategy": "kSameAsRequested",  # not the next power of two: weights are most of it
            "use_tf32": "0",  # float32 is to mean float32
        }
        # What has no kernel there runs on the CPU; with a CUDA graph nothing may.
        self.providers: list[Any] = [(self.provider, options), "CPUExecutionProvider"]

    def zeros(self, spec: TensorSpec) -> Any:
        return self._cuda.zeros(spec)

    def states(self, specs: Sequence[TensorSpec]) -> list[Any]:
        return [self.zeros(spec) for spec in specs]

    def staged(self, spec: TensorSpec) -> Staged:
        return Staged(self._cuda, spec)

    def row(self, array: Any, index: int) -> Any:
        return array.row(index)

    def bind(self, bind: Any, name: str, array: Any) -> None:
        bind(name, "cuda", 0, array.dtype, array.shape, array.address)

    def run_options(self, binding_index: int) -> ort.RunOptions | None:
        if not self._graphs:
            return None
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(binding_index + 1))  # one for each set of addresses
        return options


def load_on_gpu(
    bundle: Path, manifest: Manifest, threads: int | None, device: type[CudaDevice] = CudaDevice
) -> OrtBackend:
    """Load the graphs on the first GPU; each step is one CUDA graph if all nodes of the graphs have kernels there.

    device: where they run.

    Raises: as `OrtBackend`, and BackendError if there is no GPU or this onnxruntime cannot use it.
    """
    if device.provider not in ort.get_available_providers():
        raise BackendError(
            problem(
                "backend 'ort-cuda'",
                received=f"onnxruntime {ort.__version__} for the CPU",
                expected="onnxruntime-gpu",
                fix="pip uninstall onnxruntime, then pip install 'sinkexport[cuda]': they share one folder",
            )
        )
    cuda = Cuda()
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it misses; a session reports that better
            ort.preload_dlls()
    ort.set_default_logger_severity(4)
    try:
        return OrtBackend(bundle, manifest, threads, False, device(cuda, graphs=True))
    except (BackendError, BundleError) as error:  # some node stays on the CPU, or something else: then it comes again
        reason = str(error)
    # Not in that block: the error's traceback holds the first attempt's weights, and there may be no room for two.
    try:
        return OrtBackend(bundle, manifest, threads, False, device(cuda, graphs=False), reason)
    except (BackendError, BundleError) as error:
        if "cudnn" not in str(error.__cause__).lower():
            raise
        raise BackendError(
            problem(
                "backend 'ort-cuda'",
                received=first_line(error.__cause__ or error),
                expected="cuDNN 9, or what this onnxruntime-gpu was built for",
                fix="pip install 'sinkexport[cuda]'",
            )
        ) from error
