"""The C interfaces of norms and gates, built for the tests: for a GPU, or with kernels that run on the host."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from plugins.capi.kernels import GatedActivation, RmsNorm
from tests.plugins.compiler import CAPI, INCLUDES, KERNELS, ROOT, WARNINGS, compile_sources, link, run_nvcc

NAMES = ("rms_norm", "gated_activation")


@dataclasses.dataclass(frozen=True)
class NormAndGate:
    norm: RmsNorm
    gate: GatedActivation

    @classmethod
    def of(cls, library: Path) -> NormAndGate:
        return cls(RmsNorm(library), GatedActivation(library))


def build(folder: Path, architecture: str) -> NormAndGate:
    """Compiled for one `architecture`, like "sm_90" or "native"."""
    target = f"-arch={architecture}"
    sources = [*(KERNELS / f"{name}.cu" for name in NAMES), *(CAPI / f"{name}.cpp" for name in NAMES)]
    return NormAndGate.of(link(folder / "libnorm_and_gate.so", compile_sources(folder, sources, "-O3", target), target))


def build_on_host(folder: Path) -> NormAndGate:
    """The same kernels as threads of the host, which read and write the host's memory. They refuse nothing."""
    library = folder / "libnorm_and_gate_on_host.so"
    source = ROOT / "tests/plugins/norm_and_gate_on_host.cpp"
    flags = ("-std=c++17", "-O1", *WARNINGS, "-Xcompiler=-Wno-unknown-pragmas", *INCLUDES)
    run_nvcc(*flags, "-shared", str(source), "-o", str(library), "-lpthread")
    return NormAndGate.of(library)
