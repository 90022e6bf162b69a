"""Draw what `endless.py` recorded: time and memory against tokens, one line a decoder.

    python benchmarks/plot_endless.py benchmarks/results/endless.json -o docs/img/endless.svg

The line is the median of each bucket; the pale area above it reaches to the bucket's 99th percentile, and a dot marks a
token that took more than twice the median. The same JSON gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

STYLES = {  # label, colour: kept apart by colour-blind people too
    "sinkexport": ("sinkexport", "#0072b2"),
    "llamacpp": ("llama.cpp, context shift", "#e69f00"),
    "transformers": ("transformers, growing cache", "#d55e00"),
}
MAX_POINTS = 120
"""Buckets drawn for each decoder; more are merged, evenly along the logarithmic axis."""


def draw(result: dict[str, Any]) -> Figure:
    """Milliseconds a token at the left, resident memory at the right, against the token's number."""
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    times, memory = figure.subplots(1, 2)
    for name, (label, color) in STYLES.items():
        if (each := result["decoders"].get(name)) is None:
            continue
        buckets = merged({key: np.asarray(values, float) for key, values in each["buckets"].items()})
        end = buckets["end"]
        times.plot(end, buckets["median_ms"], color=color, linewidth=2, label=label)
        times.fill_between(end, buckets["median_ms"], buckets["p99_ms"], color=color, alpha=0.2, linewidth=0)
        spikes = buckets["max_ms"] > 2 * buckets["median_ms"]
        times.plot(end[spikes], buckets["max_ms"][spikes], ".", color=color, markersize=2.5, alpha=0.5)
        memory.plot(end, buckets["resident_mb"], color=color, linewidth=2, label=label)
        for axes, key in ((times, "median_ms"), (memory, "resident_mb")):
            axes.plot(end[-1], buckets[key][-1], "o", color=color, markersize=4)
    capacity = result["cache"]["sinks"] + result["cache"]["window"]
    for axes in (times, memory):
        _axes(axes, capacity)
    times.set_ylabel("ms a token")
    times.set_yscale("log")
    times.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    times.yaxis.set_minor_formatter(FuncFormatter(_two_or_five))
    memory.set_ylabel("resident memory, MB")
    memory.set_ylim(bottom=0)
    memory.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    handles, labels = times.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.supxlabel(_title(result), fontsize=8, color="#666666")
    return figure


def merged(buckets: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """At most `MAX_POINTS` buckets: medians of medians, of p99s and of memory; the largest of the maxima."""
    end = buckets["end"]
    edges = np.geomspace(end[0], end[-1], min(MAX_POINTS, len(end)))
    groups = np.searchsorted(edges, end * (1 - 1e-9))
    found: dict[str, list[float]] = {key: [] for key in buckets}
    for group in np.unique(groups):
        at = groups == group
        for key, values in buckets.items():
            reduce = np.max if key in ("end", "max_ms") else np.median
            found[key].append(float(reduce(values[at])))
    return {key: np.asarray(values) for key, values in found.items()}


def _axes(axes: Axes, capacity: int) -> None:
    axes.set_xscale("log")
    axes.set_xlabel("tokens so far")
    axes.xaxis.set_major_formatter(FuncFormatter(_count))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(capacity, color="#999999", linestyle="--", linewidth=1)
    axes.annotate("cache full", (capacity, 1), (3, -9), "data", "offset points", fontsize=7, color="#777777")
    axes.texts[-1].xycoords = ("data", "axes fraction")
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _two_or_five(value: float, _: object) -> str:
    """Labels for 2, 5, 20, 50 .. between the powers of ten of a logarithmic axis."""
    digits = f"{value:.0e}".partition("e")[0]
    return f"{value:g}" if digits in ("2", "5") else ""


def _count(value: float, _: object) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def _title(result: dict[str, Any]) -> str:
    machines = {(e["environment"]["cpu"], e["environment"]["threads"]) for e in result["decoders"].values()}
    where = "; ".join(f"{cpu}, {count} thread{'s' * (count > 1)}" for cpu, count in sorted(machines))
    cache = result["cache"]
    return f"SmolLM2-135M, {result['dtype']}, {cache['sinks']} sinks + window of {cache['window']:,}; {where}"


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True, help="an .svg or .png file")
    arguments = parser.parse_args()
    result = json.loads(arguments.json.read_text(encoding="utf-8"))
    mpl.rcParams["svg.hashsalt"] = "endless"  # ids in the file are the same each time
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if arguments.out.suffix == ".svg" else None
    draw(result).savefig(arguments.out, dpi=150, metadata=metadata)


if __name__ == "__main__":
    main()
