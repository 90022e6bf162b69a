"""plugins/cpu, compiled once for the tests: the operators for ONNX Runtime and the kernels' C interface."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "plugins/cpu"


def compile_plugins(folder: Path, *targets: str, options: tuple[str, ...] = ()) -> Path:
    """Configure with the C interface, and build `targets` in `folder`, which is returned. options: of CMake."""
    if shutil.which("cmake") is None:
        pytest.fail("no cmake on the PATH: pip install cmake")
    for command in (
        ["cmake", "-S", SOURCE, "-B", folder, "-DSINKEXPORT_CPU_TESTS=ON", *options],
        ["cmake", "--build", folder, "-j2", "--target", *targets],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def compile_for_this_machine(folder: Path) -> Path:
    """Both libraries, which share the kernels."""
    return compile_plugins(folder, "sinkexport_cpu", "sinkexport_cpu_capi")
