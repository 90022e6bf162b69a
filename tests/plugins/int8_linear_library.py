"""The INT8 linear's C interface, built with nvcc for the tests."""

from __future__ import annotations

from pathlib import Path

from plugins.capi.int8_linear import Int8Linear
from tests.plugins.compiler import CAPI, KERNELS, compile_sources, link


def build(folder: Path, architecture: str) -> Int8Linear:
    """Compiled for one `architecture`, like "sm_90" or "native"."""
    target = f"-arch={architecture}"
    objects = compile_sources(folder, [KERNELS / "int8_linear.cu", CAPI / "int8_linear.cpp"], "-O3", target)
    return Int8Linear(link(folder / "libint8_linear.so", objects, target))
