"""The C interfaces of sink attention and stream angles, built with nvcc for the tests."""

from __future__ import annotations

from pathlib import Path

from plugins.capi.kernels import SinkAttention
from tests.plugins.compiler import CAPI, KERNELS, compile_sources, link

SOURCES = [
    *sorted(KERNELS.glob("sink_attention*.cu")),
    KERNELS / "stream_angles.cu",
    CAPI / "sink_attention.cpp",
    CAPI / "stream_angles.cpp",
]


def build(folder: Path, architecture: str, *flags: str) -> SinkAttention:
    """Compiled for one `architecture`, like "sm_90" or "native"."""
    target = f"-arch={architecture}"
    objects = compile_sources(folder, SOURCES, "-O3", target, *flags)
    return SinkAttention(link(folder / "libsink_attention.so", objects, target))
