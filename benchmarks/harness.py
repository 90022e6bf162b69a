"""What every benchmark shares: tables, where and with what it ran, peak memory.

Statistics and the bandwidth probe are those of `sinkexport bench`. Workers import this file in environments that need
not have sinkexport, so it is imported late here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGES = (
    "sinkexport",
    "onnxruntime",
    "onnxruntime-genai",
    "transformers",
    "torch",
    "llama-cpp-python",
    "xllamacpp",
    "openvino-genai",
    "numpy",
)


def environment(threads: int, peer_packages: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Command, commit, machine and versions: without them a number says nothing.

    peer_packages: versions in the peers' environment, for what is not in this one.
    """
    from sinkexport.bench import machine

    facts = machine.environment(threads, PACKAGES)
    packages = {**(peer_packages or {}), **facts["packages"]}
    return {**facts, "packages": packages, "commit": _commit(), "command": command()}


def versions() -> dict[str, str]:
    """Versions of the packages that matter in this environment."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def command() -> str:
    """What was typed, as it can be typed again."""
    return shlex.join(["python", *sys.argv])


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], texts: Sequence[int] = (0,)) -> str:
    """A Markdown table that is aligned as plain text too.

    texts: columns of text, which go to the left; the others are numbers and go to the right.
    """
    headers, *rows = ([cell.replace("|", r"\|") for cell in row] for row in [headers, *rows])
    widths = [max(3, *(len(row[i]) for row in [headers, *rows])) for i in range(len(headers))]
    rule = ["-" * width if i in texts else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = []
    for row in [headers, rule, *rows]:
        cells = [
            cell.ljust(width) if i in texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def where(facts: dict[str, Any]) -> str:
    """A line or two on the machine for people."""
    return (
        f"{facts['cpu']}, {facts['threads']} threads of {facts['logical_cpus']} CPUs, load average "
        f"{facts['load_average_1min']:.2f}, commit {facts['commit']}\n"
        f"{', '.join(f'{name} {version}' for name, version in facts['packages'].items())}"
    )


def add_peer_options(parser: argparse.ArgumentParser, peers: str, note: str = "empty for none") -> None:
    """Add what benchmarks beside other decoders take. peers: those that run by default, with commas."""
    parser.add_argument("--peers", default=peers, help=f"comma-separated; {note}; default: {peers}")
    parser.add_argument(
        "--peer-python", default=sys.executable, help="interpreter that has onnxruntime-genai, OpenVINO"
    )
    parser.add_argument("--cache", type=Path, help="folder for converted models; default: beside the first bundle")
    parser.add_argument("--json", type=Path, help="write all figures here")


def check_json(path: Path | None) -> None:
    """End with one line before any work if `path` could not be written after it."""
    from sinkexport.util.files import check_writable
    from sinkrt.errors import UsageError

    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            check_writable(path, "--json")
        except (UsageError, OSError) as error:
            raise SystemExit(f"error: {error}") from None


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Readable and stable, so that two runs can be compared with diff. No path: nothing."""
    from sinkexport.util.files import write_whole

    if path is not None:
        text = json.dumps(result, indent=1, sort_keys=True)
        text = re.sub(r"\[[^\[\]{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text)  # on one line
        write_whole(path, text + "\n", "--json")


def peak_memory_mb() -> float:
    """Most memory this process ever had resident, in MB.

    Not getrusage: its figure survives exec, so a worker would report what its parent had used.
    """
    return _status_mb("VmHWM")


def resident_mb() -> float:
    """Memory that this process has resident now, in MB."""
    return _status_mb("VmRSS")


def anonymous_mb() -> float:
    """Memory that this process has resident now and that belongs to no file, in MB: what it has allocated."""
    return _status_mb("RssAnon")


def proportional_mb() -> float:
    """Memory that this process has resident now, in MB, each page divided by how often it is mapped."""
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return int(rollup.split("\nPss:")[1].split()[0]) * 1024 / 1e6


def _status_mb(field: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{field}:")[1].split()[0]) * 1024 / 1e6


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git checkout)"
