"""The C interface of the CPU kernels (plugins/cpu/capi), which conftest.py compiles."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from pathlib import Path

from tests.plugins.cpu_library import SOURCE

KERNELS = SOURCE / "kernels"
VARIABLE = "SINKEXPORT_CPU_CAPI"
"""Environment variable: the library's path. Given, nothing is compiled."""

ISAS = ("portable", "avx2", "avx2_vnni", "avx512_vnni", "avx512_bf16", "neon_dot", "neon_i8mm")
"""Numbers of kernels/isa.h."""

ISAS_OF_MACHINE = {"x86_64": ISAS[:5], "aarch64": (ISAS[0], *ISAS[5:])}.get(platform.machine(), ISAS[:1])
"""Those that a processor of this kind may have: tests are collected before the library is there to be asked."""


def library_path() -> Path:
    """The library, with all instruction sets that the compiler knows."""
    return Path(os.environ[VARIABLE])


@functools.cache
def library() -> ctypes.CDLL:
    """The library, loaded."""
    return ctypes.CDLL(str(library_path()))


def isas_here() -> list[str]:
    """Names of the instruction sets that the library and this processor have."""
    return [name for number, name in enumerate(ISAS) if library().sinkexport_cpu_has_isa(number)]
