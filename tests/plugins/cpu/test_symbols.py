"""Code for one instruction set stays out of what all others run: the linker keeps one copy of a shared function."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.plugins.cpu.library import library_path

WEAK = re.compile(r"^\S* [WVu] (.*)$")


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm: apt-get install binutils")
def test_kernels_share_no_function():
    archive = library_path().parent / "libsinkexport_cpu_kernels.a"
    done = subprocess.run(["nm", "-C", "--defined-only", archive], capture_output=True, text=True, check=True)
    found, member = 0, ""
    for line in done.stdout.splitlines():
        member = line.rstrip(":") if line.endswith(".o:") else member
        match = WEAK.match(line)
        if match and member.endswith("_kernel.cpp.o"):
            found += 1
            assert re.search(r"sinkexport::cpu::[a-z0-9_]+::", match[1]), match[1]
    assert found
