"""The C interface of the CPU kernels (plugins/cpu/capi), built once for the tests.

SINKEXPORT_CPU_CAPI: a library that is built already.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parents[3] / "plugins/cpu"
KERNELS = SOURCE / "kernels"
ISAS = ("portable", "avx2", "avx2_vnni", "avx512_vnni", "avx512_bf16", "neon_dot", "neon_i8mm")
"""Numbers of kernels/isa.h."""


@functools.cache
def library_path() -> Path:
    """Build libsinkexport_cpu_capi.so, all instruction sets that the compiler knows."""
    if given := os.environ.get("SINKEXPORT_CPU_CAPI"):
        return Path(given)
    folder = Path(tempfile.mkdtemp(prefix="sinkexport-cpu-"))
    configure = ["cmake", "-S", str(SOURCE), "-B", str(folder), "-DSINKEXPORT_CPU_TESTS=ON"]
    for command in (configure, ["cmake", "--build", str(folder), "-j2", "--target", "sinkexport_cpu_capi"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "libsinkexport_cpu_capi.so"


@functools.cache
def library() -> ctypes.CDLL:
    """The library, loaded."""
    return ctypes.CDLL(str(library_path()))


def isas_here() -> list[str]:
    """Names of the instruction sets that the library and this processor have."""
    return [name for number, name in enumerate(ISAS) if library().sinkexport_cpu_has_isa(number)]
