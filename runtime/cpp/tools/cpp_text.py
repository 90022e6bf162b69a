"""What the generators of C++ share."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

NOTICE = "// Generated from runtime/sinkrt/contract by runtime/cpp/tools/make_manifest.py (`make generated`).\n"


def formatted(text: str, path: Path) -> str:
    """Return C++ source as clang-format lays it out for `path`."""
    beside = Path(sys.executable).with_name("clang-format")
    program = str(beside) if beside.exists() else shutil.which("clang-format")
    if program is None:
        sys.exit("clang-format: received none, expected it beside this Python or on the path; pip install clang-format")
    command = [program, f"--assume-filename={path}"]
    return subprocess.run(  # noqa: S603 - clang-format
        command, input=text, capture_output=True, text=True, check=True
    ).stdout


def quoted(text: str) -> str:
    """Return a C++ string literal of plain ASCII."""
    assert text.isascii() and text.isprintable() and not set('"\\') & set(text)
    return f'"{text}"'
