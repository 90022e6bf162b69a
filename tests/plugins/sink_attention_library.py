"""The C interface of sink attention, built with nvcc for the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from plugins.capi.sink_attention import SinkAttention

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "plugins/kernels"
SOURCES = [*sorted(KERNELS.glob("sink_attention*.cu")), KERNELS / "stream_angles.cu"]
NVCC = shutil.which("nvcc")

needs_nvcc = pytest.mark.skipif(
    NVCC is None and not os.environ.get("SINKEXPORT_NO_SKIP"), reason="needs CUDA's compiler: no nvcc on the PATH"
)


def compile_sources(folder: Path, architecture: str, *flags: str) -> list[Path]:
    """Object files for one `architecture`, like "sm_90" or "native", all warnings being errors."""

    def compiled(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        command = [
            NVCC or "nvcc", "-std=c++17", "-O3", f"-arch={architecture}", *flags, "-Werror=all-warnings",
            "-Xcompiler=-Wall,-Wextra,-Werror,-fPIC", f"-I{KERNELS}", f"-I{ROOT / 'runtime/cpp/include'}",
            "-c", str(source), "-o", str(target),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, [*SOURCES, ROOT / "plugins/capi/sink_attention.cpp"]))


def build(folder: Path, architecture: str, *flags: str) -> SinkAttention:
    """The library of `compile_sources`."""
    library = folder / "libsink_attention.so"
    objects = [str(path) for path in compile_sources(folder, architecture, *flags)]
    command = [NVCC or "nvcc", "-shared", f"-arch={architecture}", *objects, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return SinkAttention(library)
