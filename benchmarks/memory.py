"""What a bundle takes in memory: the most that is resident while it loads and while it runs, and how long it loads.

    python benchmarks/memory.py BUNDLE.. [--threads N] [--steps 64] [--json FILE]

Each bundle is loaded by a fresh process, which then feeds a prompt that fills the cache, in chunks, and takes some
steps. Python and its libraries are what a process that imports the same has resident, and opens no bundle. A session
touches more pages of these libraries, mainly of ONNX Runtime; they are a column of their own. All is in MB.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import check_json, environment, peak_memory_mb, proportional_mb, resident_mb, table, where, write_json

IMPORTS_ONLY = "-"


def libraries_mb() -> float:
    """Memory that this process has resident of shared libraries' and the interpreter's files."""
    kilobytes, is_library = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            path = line.split(maxsplit=5)[5:]
            is_library = bool(path) and re.search(r"\.so(\.[\d.]+)?$|/python[\d.]*$", path[0]) is not None
        elif is_library and line.startswith("Rss:"):
            kilobytes += int(line.split()[1])
    return kilobytes * 1024 / 1e6


def now_mb() -> dict[str, float]:
    """Figures of this process, in MB."""
    found = {
        "peak": peak_memory_mb(),
        "resident": resident_mb(),
        "proportional": proportional_mb(),
        "libraries": libraries_mb(),
    }
    return {name: round(value, 2) for name, value in found.items()}


def work(bundle: str, threads: int, steps: int) -> dict[str, Any]:
    """Load a bundle and use it, or only import what that needs. Memory in MB."""
    import numpy as np
    import sinkrt.backends.ort  # noqa: F401 - it imports ONNX Runtime
    from sinkrt import Session

    random = np.random.default_rng(0)  # NumPy imports that module when it is first used
    out: dict[str, Any] = {"imported": now_mb()}
    if bundle == IMPORTS_ONLY:
        return out
    start = time.perf_counter()
    session = Session.load(bundle, backend="ort", threads=threads)
    out["load_s"] = time.perf_counter() - start
    out["loaded"] = now_mb()
    manifest = session.manifest
    shape = session.batch, session.capacity + session.chunk_size
    prompts = random.integers(0, manifest.model.vocab_size, shape)
    ids = session.prefill(prompts).argmax(axis=1)
    for _ in range(steps):
        ids = session.step(ids).argmax(axis=1)
    out["used"] = now_mb()
    return {**out, "weights_mb": manifest.weights_bytes / 1e6, "states_mb": manifest.state_bytes / 1e6}


def measured(bundle: str, threads: int, steps: int) -> dict[str, Any]:
    """`work` in a fresh process."""
    command = [sys.executable, __file__, bundle, "--work", f"--threads={threads}", f"--steps={steps}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"'{bundle}': its process ended with {done.returncode}; see above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def ratios(found: dict[str, Any], empty: dict[str, float]) -> dict[str, float]:
    """Memory beyond Python and its libraries, as a multiple of weights and states.

    load, peak: the most while it loaded, and altogether. without_libraries: the latter without the pages of libraries
    that only a session touches. proportional: at the end, each page divided by how often it is mapped.
    """
    whole = found["weights_mb"] + found["states_mb"]
    libraries = found["used"]["libraries"] - empty["libraries"]
    peak = found["used"]["peak"] - empty["peak"]
    return {
        "load": (found["loaded"]["peak"] - empty["peak"]) / whole,
        "peak": peak / whole,
        "without_libraries": (peak - libraries) / whole,
        "proportional": (found["used"]["proportional"] - empty["proportional"]) / whole,
    }


def show(result: dict[str, Any]) -> str:
    """The table for people."""
    empty = result["empty"]
    rows = []
    for name, each in result["bundles"].items():
        ratio = each["ratios"]
        rows.append(
            [
                name,
                f"{each['weights_mb'] + each['states_mb']:.0f}",
                f"{each['loaded']['peak']:.0f}",
                f"{each['used']['peak']:.0f}",
                f"{ratio['load']:.3f}",
                f"{ratio['peak']:.3f}",
                f"{each['used']['libraries'] - empty['libraries']:.1f}",
                f"{ratio['without_libraries']:.3f}",
                f"{each['load_s']:.2f}",
            ]
        )
    headers = ["bundle", "weights and states", "most, loading", "most", "ratio, loading", "ratio"]
    headers += ["more of libraries", "ratio without", "s to load"]
    return "\n".join(
        [
            where(result["environment"]),
            f"Python and libraries alone: {empty['peak']:.1f} MB, {empty['libraries']:.1f} MB of it libraries",
            "",
            table(headers, rows),
        ]
    )


def main() -> None:
    """Run the benchmark, or the work of one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", help="folders")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--steps", type=int, default=64, help="after the prompt")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps(work(arguments.bundles[0], arguments.threads, arguments.steps)))
        return
    check_json(arguments.json)
    result: dict[str, Any] = {"environment": environment(arguments.threads), "bundles": {}}
    result["empty"] = measured(IMPORTS_ONLY, arguments.threads, 0)["imported"]
    for bundle in arguments.bundles:
        found = measured(bundle, arguments.threads, arguments.steps)
        result["bundles"][Path(bundle).name] = {**found, "ratios": ratios(found, result["empty"])}
    print(show(result))
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
