"""The TensorRT plugin library, compiled for the tests against the headers of PyPI's kernel-lens (TensorRT 10.14)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from tests.plugins.compiler import KERNELS, NVCC, ROOT, compile_sources, link

SOURCES = [*sorted((ROOT / "plugins/trt").glob("*.cpp")), *sorted(KERNELS.glob("*.cu"))]
LIBRARY = "libsinkexport_plugin.so"
# Nothing is launched without a GPU: PTX alone, which spares ptxas, is compiled in a third of the time.
PTX_ONLY = "-gencode=arch=compute_80,code=compute_80"


def headers() -> Path | None:
    """The folder of NvInfer.h; None if the package is not installed."""
    spec = importlib.util.find_spec("kernel_lens")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "include" / "tensorrt"


needs_plugin_build = pytest.mark.skipif(
    (NVCC is None or headers() is None) and not os.environ.get("SINKEXPORT_NO_SKIP"),
    reason="needs nvcc on the PATH and TensorRT's headers: pip install --no-deps kernel-lens==2.0.1",
)


def build_plugin(folder: Path) -> Path:
    """Compile and link, every warning being an error."""
    objects = compile_sources(
        folder, SOURCES, "-O1", PTX_ONLY, "-Xcompiler=-fvisibility=hidden", "-isystem", str(headers())
    )
    return link(folder / LIBRARY, objects, PTX_ONLY)
