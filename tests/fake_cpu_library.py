"""Stand-ins for the CPU library that a C compiler makes in no time: functions that return what a test says."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from sinkrt.contract import CPU_ABI

COMPILER = shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(
    COMPILER is None and not os.environ.get("SINKEXPORT_NO_SKIP"), reason="needs a C compiler: no cc on the PATH"
)
FAILS = (
    "void* const* api = ((void* const* (*)(unsigned))base[0])(17); "
    'return ((void* (*)(int, const char*))api[0])(1, "threads: received 3 (no more), expected 9");'
)
"""Body of RegisterCustomOps that returns an error: entry 0 of ONNX Runtime's table makes it."""


def compiled(folder: Path, **texts: str | None) -> Path:
    """A CPU library whose functions return these texts; `operators`: what RegisterCustomOps does."""
    source, path = folder / "library.c", folder / "library.so"
    lines = []
    for name, text in {"abi": f'"{CPU_ABI}"', "problem": "0", "isa": '"avx2"', **texts}.items():
        if name != "operators" and text is not None:
            lines.append(f"const char* sinkexport_cpu_{name}(void) {{ return {text}; }}")
    if (operators := texts.get("operators", "return (void*)0;")) is not None:
        lines.append(f"void* RegisterCustomOps(void* options, void* const* base) {{ {operators} }}")
    source.write_text("\n".join(lines))
    command = [COMPILER or "cc", "-shared", "-fPIC", "-w", str(source), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path
