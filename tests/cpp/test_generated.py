"""What the C++ runtime takes over: sources that follow from `sinkrt.contract`, and vendored code."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.cpp.build import SOURCES

GENERATOR = SOURCES / "tools/make_manifest.py"


def test_generated_sources_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, GENERATOR, "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_a_changed_source_is_found_and_written_anew(tmp_path: Path) -> None:
    """In a copy of the tree: one file is edited, and the C interface's region emptied."""
    for name in ("cpp", "sinkrt"):
        ignored = shutil.ignore_patterns("__pycache__", "third_party")
        shutil.copytree(SOURCES.parent / name, tmp_path / "runtime" / name, ignore=ignored)
    shutil.copyfile(SOURCES.parents[1] / ".clang-format", tmp_path / ".clang-format")
    cpp = tmp_path / "runtime/cpp"
    edited = {name: (cpp / name).read_text() for name in ("include/sinkrt/constants.h", "include/sinkrt/sinkrt.h")}
    for name, text in edited.items():
        (cpp / name).write_text(re.sub(r"kSchemaVersion = \d+|  int64_t top_k;.*\n", "", text))
    command = [sys.executable, cpp / "tools/make_manifest.py"]
    done = subprocess.run([*command, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == [f"runtime/cpp/{name}" for name in edited]
    subprocess.run(command, capture_output=True, check=True)
    assert {name: (cpp / name).read_text() for name in edited} == edited


def test_the_vendored_header_is_the_release() -> None:
    table = (SOURCES / "third_party/README.md").read_text(encoding="utf-8")
    header = (SOURCES / "third_party/nlohmann/json.hpp").read_bytes()
    assert f"`{hashlib.sha256(header).hexdigest()}`" in table
    assert b"version 3.12.0" in header[:300]
