"""The linear's C interface, built with nvcc for the tests."""

from __future__ import annotations

from pathlib import Path

from plugins.capi.linear import Linear
from tests.plugins.compiler import CAPI, KERNELS, compile_sources, link


def build(folder: Path, architecture: str) -> Linear:
    """Compiled for one `architecture`, like "sm_90" or "native"."""
    target = f"-arch={architecture}"
    objects = compile_sources(folder, [KERNELS / "linear.cu", CAPI / "linear.cpp"], "-O3", target)
    return Linear(link(folder / "liblinear.so", objects, target))
