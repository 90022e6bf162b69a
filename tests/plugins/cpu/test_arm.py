"""The ARM kernels, compiled by a cross compiler and run by an emulated processor.

Needs Debian's packages g++-aarch64-linux-gnu and qemu-user; it is skipped where they are not, in CI too:

    apt-get install g++-aarch64-linux-gnu qemu-user
    python -m pytest tests/plugins/cpu/test_arm.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.plugins.cpu.calls import run_replay
from tests.plugins.cpu.linear_cases import Problem
from tests.plugins.cpu.test_linear import cases, check, expert_calls, largest_sums, row_calls
from tests.plugins.cpu_library import compile_plugins

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PROCESSORS = {"portable": "cortex-a53", "neon_dot": "neoverse-n1", "neon_i8mm": "max"}
"""An emulated processor for each instruction set; the first two lack the next one's instructions."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which(COMPILER) is None or shutil.which(EMULATOR) is None,
        reason=f"needs {COMPILER} and {EMULATOR}: apt-get install g++-aarch64-linux-gnu qemu-user",
    ),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """capi/replay for ARM, without shared libraries."""
    toolchain = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"]
    options = (*toolchain, "-DCMAKE_EXE_LINKER_FLAGS=-static")
    return compile_plugins(tmp_path_factory.mktemp("arm"), "replay", options=options) / "replay"


@pytest.mark.parametrize("isa", PROCESSORS)
def test_kernels(isa, program, tmp_path):
    tasks = [Problem(case, seed) for seed, case in enumerate(cases())]
    calls = [task.call(isa, threads=1 + i % 3) for i, task in enumerate(tasks)]
    sums, exact = largest_sums(isa)
    experts, wanted = expert_calls(isa)
    rows, table = row_calls()
    run_replay([EMULATOR, "-cpu", PROCESSORS[isa], str(program)], [*calls, *sums, *experts, *rows], tmp_path)
    for task, call in zip(tasks, calls, strict=True):
        check(task, call.results)
    for calls, results in ((sums, exact), (experts, wanted), (rows, table)):
        for call, result in zip(calls, results, strict=True):
            assert np.array_equal(call.results, result() if callable(result) else result)


def test_an_instruction_set_that_the_processor_lacks_is_refused(program, tmp_path):
    call = Problem(cases()[0]).call("neon_i8mm")
    with pytest.raises(AssertionError, match="this processor lacks the instruction set"):
        run_replay([EMULATOR, "-cpu", "neoverse-n1", str(program)], [call], tmp_path)
