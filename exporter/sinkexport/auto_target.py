"""The choice that ``--target auto``, the default, leaves to the machine, and why it fell so."""

from __future__ import annotations

import dataclasses

from sinkrt.backends.cpu_library import find_library, is_usable

from sinkexport.targets import CPU, ONNX, Target

CPU_DTYPE = "fp32"
"""Value of ``--dtype`` that the CPU library computes with."""


@dataclasses.dataclass(frozen=True)
class AutoTarget:
    """A chosen target. reason: why, in words that stand after its name."""

    target: Target
    reason: str


def auto_target(dtype: str) -> AutoTarget:
    """Choose cpu where the CPU library runs and has kernels for the export, else onnx. dtype: value of ``--dtype``."""
    if dtype != CPU_DTYPE:
        return AutoTarget(ONNX, f"the CPU library has no kernels for --dtype {dtype}")
    if is_usable():
        return AutoTarget(CPU, f"the CPU library runs here; bundles for any machine: --target {ONNX.option}")
    missing = "no CPU library here" if find_library() is None else "the CPU library does not run here"
    return AutoTarget(ONNX, f"{missing}, see 'sinkexport inspect cpu'")
