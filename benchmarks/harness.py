"""What every benchmark shares: tables, where and with what it ran, peak memory.

Statistics and the bandwidth probe are those of `sinkexport bench`. Workers import this file in environments that need
not have sinkexport, so it is imported late here.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("sinkexport", "onnxruntime", "onnxruntime-genai", "transformers", "torch", "llama-cpp-python", "numpy")


def environment(threads: int) -> dict[str, Any]:
    """Command, commit, machine and versions: without them a number says nothing."""
    from sinkexport import machine

    return {**machine.environment(threads, PACKAGES), "commit": _commit(), "command": command()}


def command() -> str:
    """What was typed, as it can be typed again."""
    return shlex.join(["python", *sys.argv])


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is aligned as plain text too, the first column to the left, numbers to the right."""
    widths = [max(3, *(len(row[i]) for row in [headers, *rows])) for i in range(len(headers))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for first, *numbers in [headers, rule, *rows]:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(numbers, widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def where(facts: dict[str, Any]) -> str:
    """A line or two on the machine for people."""
    return (
        f"{facts['cpu']}, {facts['threads']} threads of {facts['logical_cpus']} CPUs, load average "
        f"{facts['load_average_1min']:.2f}, commit {facts['commit']}\n"
        f"{', '.join(f'{name} {version}' for name, version in facts['packages'].items())}"
    )


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Readable and stable, so that two runs can be compared with diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def peak_memory_mb() -> float:
    """Most memory this process ever had resident, in MB.

    Not getrusage: its figure survives exec, so a worker would report what its parent had used.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git checkout)"
