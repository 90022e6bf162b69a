"""The C interfaces of matmuls by constant matrices, built with nvcc for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch

from plugins.capi.kernels import ExpertLinear, Int4Rows, Linear
from tests.plugins.compiler import CAPI, FOR_WARPGROUPS, KERNELS, compile_sources, link

Interface = TypeVar("Interface", Linear, ExpertLinear, Int4Rows)


def build(interface: type[Interface], folder: Path, architecture: str, *flags: str) -> Interface:
    """Compiled for one `architecture`, like "sm_90" or "native". flags: of the compiler, for the kernels."""
    target, name = f"-arch={architecture}", interface.NAME
    also = ["rms_norm", "gated_activation"] if interface is Linear else []  # what it launches besides
    sources = [*(KERNELS / f"{kernel}.cu" for kernel in (name, *also)), CAPI / f"{name}.cpp"]
    objects = compile_sources(folder, sources, "-O3", *flags, target)
    if interface is Linear:
        is_hopper = architecture == "sm_90" or (
            architecture == "native" and torch.cuda.get_device_capability() == (9, 0)
        )
        wide_target = FOR_WARPGROUPS if is_hopper else target
        objects += compile_sources(folder, [KERNELS / "linear_wide.cu"], "-O3", *flags, wide_target)
    return interface(link(folder / f"lib{name}.so", objects, target))
