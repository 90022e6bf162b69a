"""The INT8 linear's C interface, built with nvcc for the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from plugins.capi.int8_linear import Int8Linear

PLUGINS = Path(__file__).parents[2] / "plugins"
NVCC = shutil.which("nvcc")

needs_nvcc = pytest.mark.skipif(
    NVCC is None and not os.environ.get("SINKEXPORT_NO_SKIP"), reason="needs CUDA's compiler: no nvcc on the PATH"
)


def build(folder: Path, architecture: str) -> Int8Linear:
    """Compiles for one `architecture`, like "sm_90" or "native", all warnings being errors."""
    library = folder / "libint8_linear.so"
    command = [
        NVCC or "nvcc", "-shared", "-std=c++17", "-O3", f"-arch={architecture}",
        "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror,-fPIC", "-I", str(PLUGINS / "kernels"),
        str(PLUGINS / "kernels/int8_linear.cu"), str(PLUGINS / "capi/int8_linear.cpp"), "-o", str(library),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return Int8Linear(library)
