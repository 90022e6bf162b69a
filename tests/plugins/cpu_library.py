"""The CPU library for ONNX Runtime (plugins/cpu/ort), compiled once for the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from sinkrt.contract.constants import CPU_LIBRARY, CPU_LIBRARY_VARIABLE

SOURCE = Path(__file__).parents[2] / "plugins/cpu"


def build_cpu_library(folder: Path) -> Path:
    """Build it in `folder`; what SINKEXPORT_CPU_LIBRARY names is taken as it is."""
    if given := os.environ.get(CPU_LIBRARY_VARIABLE):
        return Path(given)
    if shutil.which("cmake") is None:
        pytest.skip("no CMake")
    for command in (
        ["cmake", "-S", str(SOURCE), "-B", str(folder)],
        ["cmake", "--build", str(folder), "-j2", "--target", "sinkexport_cpu"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "ort" / CPU_LIBRARY
