"""Export time and peak memory against the builder of onnxruntime-genai, from the same Hugging Face folder.

    python benchmarks/export_time.py MODEL [--recipe NAME|FILE] [--repeats N] [--json FILE] [--peer-python PYTHON]

Each export runs in a fresh process; imports are not counted. The builder loads the model as part of its work, so the
column to compare is the total. Of sinkexport's memory one more run is watched, see `show`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import check_json, environment, table, where, write_json
from peers import plain_folder, run_export


def run_once(
    kind: str, folder: Path, python: str, scratch: Path, variant: str, options: Sequence[str] = ()
) -> dict[str, float]:
    """One export into a throw-away folder."""
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        return run_export(kind, folder, Path(out) / "model", python, variant, options)


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """Medians of the times, the largest peak."""
    result = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    result["peak_mb"] = max(run["peak_mb"] for run in runs)
    result["total_s"] = result.get("load_s", 0.0) + result["export_s"]
    return result


def show(result: dict[str, Any]) -> str:
    """The table for people, and the most memory, with each page of a file counted once however often it is mapped."""
    rows = []
    for name, figures in result["decoders"].items():
        load = f"{figures['load_s']:.1f}" if "load_s" in figures else "(inside)"
        peak = f"{figures['peak_mb']:.0f}"
        ratio = f"{figures['peak_mb'] * 1e6 / result['weight_bytes']:.1f}"
        checks = f"{figures['checks_s']:.1f}" if "checks_s" in figures else "(none)"
        rows.append([name, load, f"{figures['export_s']:.1f}", checks, f"{figures['total_s']:.1f}", peak, ratio])
    facts, watched = result["environment"], result["memory"]
    start_mb = watched["start_mb"]
    times = (watched["proportional_mb"] - start_mb) * 1e6 / result["weight_bytes"]
    return "\n".join(
        [
            f"{result['model']}, {result['variant']}, from {result['weight_bytes'] / 1e6:.0f} MB of weights; "
            f"median of {result['repeats']}",
            where(facts),
            "",
            table(["exporter", "load s", "export s", "of it checks s", "total s", "peak MB", "peak / weights"], rows),
            "",
            f"floor: writing as many bytes takes {result['floor_s']:.2f} s",
            f"sinkexport's memory, files counted once: {watched['proportional_mb']:.0f} MB, {start_mb:.0f} MB of it "
            f"there before the model is loaded; the rest is {times:.1f} times the weights",
        ]
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder or .gguf file")
    parser.add_argument(
        "--recipe",
        default="fp32",
        metavar="NAME|FILE",
        help="quantise, without calibration; the builder then makes its int4 model",
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--no-peer", action="store_true", help="only sinkexport")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of an environment with the builder")
    parser.add_argument("--cache", type=Path, default=Path("bundles/peers"), help="folder for converted models")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    check_json(arguments.json)

    arguments.cache.mkdir(parents=True, exist_ok=True)
    folder = plain_folder(arguments.model, arguments.cache)
    kinds = {"sinkexport": sys.executable} | ({} if arguments.no_peer else {"genai": arguments.peer_python})
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(arguments.repeats):  # in turns: A B A B
        for kind, python in kinds.items():
            print(f"{kind} ..", file=sys.stderr)
            variant = "int4" if kind == "genai" and arguments.recipe != "fp32" else arguments.recipe
            runs[kind].append(run_once(kind, folder, python, arguments.cache, variant))
    watched = run_once("sinkexport", folder, sys.executable, arguments.cache, arguments.recipe, ["--watch"])
    decoders = {kind: summary(results) for kind, results in runs.items()}
    result = {
        "environment": environment(os.cpu_count() or 1),
        "model": folder.name,
        "variant": arguments.recipe,
        "repeats": arguments.repeats,
        "weight_bytes": decoders["sinkexport"].pop("weight_bytes"),
        "floor_s": decoders["sinkexport"].pop("floor_s"),
        "memory": {key: watched[key] for key in ("proportional_mb", "start_mb")},
        "decoders": decoders,
    }
    print(show(result))
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
