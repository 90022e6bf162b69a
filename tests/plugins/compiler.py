"""CUDA's compiler, as the tests run it: every warning is an error, and what it said is the failure."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "plugins/kernels"
CAPI = ROOT / "plugins/capi"
NVCC = shutil.which("nvcc")
WARNINGS = ("-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror,-fPIC")
FOR_WARPGROUPS = "-gencode=arch=compute_90a,code=sm_90a"  # what has matrix instructions of whole warpgroups
INCLUDES = (f"-I{KERNELS}", f"-I{ROOT / 'runtime/cpp/include'}")

needs_nvcc = pytest.mark.skipif(
    NVCC is None and not os.environ.get("SINKEXPORT_NO_SKIP"), reason="needs CUDA's compiler: no nvcc on the PATH"
)


def compile_sources(folder: Path, sources: Sequence[Path], *flags: str) -> list[Path]:
    """Object files in `folder`, as many at a time as there are cores."""

    def compiled(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        run_nvcc("-std=c++17", *flags, *WARNINGS, *INCLUDES, "-c", str(source), "-o", str(target))
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, sources))


def link(library: Path, objects: Sequence[Path], *flags: str) -> Path:
    """A shared library."""
    run_nvcc("-shared", *flags, *map(str, objects), "-o", str(library))
    return library


def run_nvcc(*arguments: str) -> None:
    """Fails with all that the compiler said."""
    done = subprocess.run([NVCC or "nvcc", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
