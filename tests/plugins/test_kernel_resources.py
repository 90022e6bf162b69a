"""Kernels compiled for Jetsons fit their multiprocessors: registers of a block, and static shared memory.

Attention's kernels are left out: they compile for minutes. CUDA 13 knows no 7.2 (Xavier).
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.plugins.compiler import FOR_WARPGROUPS, INCLUDES, KERNELS, NVCC, WARNINGS, needs_nvcc

pytestmark = [needs_nvcc, pytest.mark.slow]

ARCHITECTURES = ("sm_87", "sm_110")  # Orin, Thor
WIDE = "linear_wide.cu"
SOURCES = sorted(path.name for path in KERNELS.glob("*.cu") if not path.name.startswith("sink_attention"))
REGISTERS_OF_MULTIPROCESSOR, REGISTERS_OF_THREAD = 65536, 255
MOST_SHARED_BYTES = 48 << 10  # without asking for more, as no kernel's static memory can


class Usage(NamedTuple):
    """What ptxas says of a kernel."""

    architecture: str
    kernel: str
    registers: int
    shared_bytes: int


def compiled(source: str, folder: Path, *targets: str) -> str:
    """What ptxas says of a file's kernels."""
    command = [
        str(NVCC),
        "-std=c++17",
        "-O3",
        *targets,
        *WARNINGS,
        *INCLUDES,
        "-Xptxas=-v",
        "-c",
        str(KERNELS / source),
    ]
    done = subprocess.run([*command, "-o", str(folder / "kernels.o")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def usages(source: str, folder: Path) -> list[Usage]:
    """Usage of every kernel of a file, on every architecture."""
    targets = [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in ARCHITECTURES]
    found = []
    for part in re.split(r"Compiling entry function ", compiled(source, folder, *targets))[1:]:
        name, architecture = re.findall(r"'(\S+)'", part)[:2]
        (registers,) = re.findall(r"Used (\d+) registers", part)
        shared = re.findall(r"(\d+) bytes smem", part)
        found.append(Usage(architecture, name, int(registers), sum(map(int, shared))))
    return found


def threads_of(kernel: str) -> int:
    """Most threads of a block: a template parameter of the matmuls of few tokens; others have 256 or fewer."""
    warps = re.search(r"fewTokens.*?Li\d+ELi\d+ELi(\d+)E", kernel)
    return 32 * int(warps[1]) if warps else 256


@pytest.mark.parametrize("source", SOURCES)
def test_a_block_fits(source: str, tmp_path: Path) -> None:
    found = usages(source, tmp_path)
    assert {usage.architecture for usage in found} == set(ARCHITECTURES)
    for usage in found:
        assert usage.registers <= REGISTERS_OF_THREAD, usage
        assert usage.registers * threads_of(usage.kernel) <= REGISTERS_OF_MULTIPROCESSOR, usage
        assert usage.shared_bytes <= MOST_SHARED_BYTES, usage


def test_wide_matmuls_keep_their_sums_in_registers_and_go_on_in_the_background(tmp_path: Path) -> None:
    """ptxas says so if it makes each matrix instruction wait for the one before, or moves sums to memory."""
    said = compiled(WIDE, tmp_path, FOR_WARPGROUPS)
    kernels = re.findall(r"Compiling entry function '(\S*wideTokens\S*)'", said)
    frames = re.findall(r"Function properties for \S*wideTokens\S*\n\s*(.*)", said)
    assert len(kernels) == len(frames) == 12  # types of weights, of halves, tiles of 128 and 256 tokens
    assert set(frames) == {"0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"}
    assert "wgmma" not in said
    assert "setmaxnreg" not in said  # ignored
