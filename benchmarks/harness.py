"""What every benchmark shares: statistics, tables, where and with what it ran."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("sinkexport", "onnxruntime", "onnxruntime-genai", "transformers", "torch", "numpy")


@dataclasses.dataclass(frozen=True)
class Stats:
    """Times of equal pieces of work, in milliseconds."""

    samples: int
    median_ms: float
    p99_ms: float
    min_ms: float

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Stats:
        """p99 by the nearest-rank rule: a time that was really measured."""
        ordered = sorted(times_ms)
        rank = max(0, -(-99 * len(ordered) // 100) - 1)  # ceil(0.99 n) - 1
        return cls(len(ordered), statistics.median(ordered), ordered[rank], ordered[0])


def environment(threads: int, packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """Commit, machine and versions: without them a number says nothing."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "logical_cpus": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_average_1min": os.getloadavg()[0],  # other work on the machine spoils every figure
        "threads": threads,
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in packages if (version := _version(name))},
    }


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned plain text, the first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    lines = []
    for first, *numbers in [headers, ["-" * width for width in widths], *rows]:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(numbers, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Readable and stable, so that two runs can be compared with diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git checkout)"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def peak_memory_mb() -> float:
    """Most memory this process ever had resident, in MB.

    Not getrusage: its figure survives exec, so a worker would report what its parent had used.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
