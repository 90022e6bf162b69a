"""Streaming perplexity over sinks S and windows W: how many sinks does a model need?

    python benchmarks/perplexity.py MODEL --text FILE [--tokens N] [--sinks 0,1,2,4,8] [--windows 252,508,1020]
                                    [--threads N] [--out FOLDER]

Runs the model in torch with the semantics of a bundle (see docs/evaluation.md): nothing is exported. Every cell of the
table predicts the same tokens of the same text. Writes perplexity.json, perplexity.md and perplexity.png to the folder,
anew after each cell, so that a run that is cut short leaves what it has found.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import environment
from sinkexport.evaluation.baselines import sinks_and_window
from sinkexport.evaluation.perplexity import Curve, check_text, measure
from sinkexport.sources import load_model
from sinkexport.util.files import read_text, write_whole
from sinkexport.util.plot import png
from sinkexport.util.progress import shown_progress
from sinkrt.errors import SinkError, UsageError, problem

SEGMENT_TOKENS = 512
Cells = dict[tuple[int, int], Curve]
"""(S, W) -> its curve."""


def cell_name(num_sink_tokens: int, window_size: int) -> str:
    return f"S={num_sink_tokens} W={window_size}"


def markdown(cells: Cells, sinks: list[int], windows: list[int]) -> str:
    """Two tables, of all tokens and of those predicted after the first eviction; a cell that has not run is empty."""

    def rows(of: str) -> list[str]:
        lines = [
            "| sinks \\ window | " + " | ".join(str(w) for w in windows) + " |",
            "| ---: |" + " ---: |" * len(windows),
        ]
        for s in sinks:
            found = [cells.get((s, w)) for w in windows]
            lines.append(f"| {s} | " + " | ".join("" if c is None else shown(c, of) for c in found) + " |")
        return lines

    def shown(curve: Curve, of: str) -> str:
        value = getattr(curve, of)
        error = f" ± {curve.standard_error:.1f}" if of == "perplexity" and curve.standard_error is not None else ""
        return "-" if value is None else f"{value:.1f}{error}"

    return "\n".join(
        [
            "All tokens (± standard error over segments):",
            "",
            *rows("perplexity"),
            "",
            "Tokens predicted after the first eviction:",
            "",
            *rows("perplexity_after"),
            "",
        ]
    )


def draw(cells: Cells, sinks: list[int], windows: list[int], title: str) -> Any:
    """Perplexity over the number of sinks, a line for each window, with standard errors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, w in enumerate(windows):
        found = [(j, cells[s, w]) for j, s in enumerate(sinks) if (s, w) in cells]
        axes.errorbar(
            [j + 0.06 * (i - (len(windows) - 1) / 2) for j, _ in found],  # side by side, not on top of each other
            [c.perplexity for _, c in found],
            [c.standard_error or 0.0 for _, c in found],
            label=f"window {w:,}",
            marker="o",
            markersize=4,
            capsize=3,
            linewidth=1.2,
        )
    axes.set_xticks(range(len(sinks)), [str(s) for s in sinks])
    axes.set_xlabel("sinks")
    axes.set_ylabel("perplexity")
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def write(folder: Path, cells: Cells, facts: dict[str, Any], sinks: list[int], windows: list[int]) -> None:
    figures = {
        **facts,
        "cells": [{"num_sink_tokens": s, "window_size": w, **dataclasses.asdict(c)} for (s, w), c in cells.items()],
    }
    write_whole(folder / "perplexity.json", json.dumps(figures, indent=1) + "\n", "--out")
    write_whole(folder / "perplexity.md", markdown(cells, sinks, windows), "--out")
    title = f"{facts['model']}, {facts['num_tokens']:,} tokens of {facts['text']}"
    write_whole(folder / "perplexity.png", png(draw(cells, sinks, windows, title)), "--out")


def run(arguments: argparse.Namespace) -> None:
    sinks, windows = arguments.sinks, arguments.windows
    text = read_text(arguments.text, "--text")
    if not os.access(arguments.out, os.W_OK | os.X_OK) or not arguments.out.is_dir():  # before long work
        raise UsageError(
            problem(
                "--out",
                received=f"'{arguments.out}'",
                expected="a folder that can be written to",
                fix="make it, or choose another",
            )
        )
    torch.set_num_threads(arguments.threads)
    loaded = load_model(arguments.model)
    ids = np.asarray(loaded.text_tokenizer().encode(text)[: arguments.tokens], dtype=np.int64)
    check_text(ids)
    facts = {
        "environment": environment(arguments.threads),
        "model": loaded.name,
        "text": arguments.text.name,
        "num_tokens": len(ids),
        "segment_tokens": SEGMENT_TOKENS,
    }
    cells: Cells = {}
    pairs = [(s, w) for s in sinks for w in windows]
    with shown_progress({cell_name(*pair): cell_name(*pair) for pair in pairs}) as show:
        for s, w in pairs:
            decoder = sinks_and_window(loaded.model, ids, s, w, name=cell_name(s, w))
            cells[s, w] = measure(decoder, ids, segment_tokens=SEGMENT_TOKENS, capacity=s + w, report=show)
            if not math.isfinite(cells[s, w].perplexity):
                raise SystemExit(f"{decoder.name}: the perplexity is not finite")
            write(arguments.out, cells, facts, sinks, windows)
    print(
        f"{loaded.name}, {len(ids):,} tokens of {arguments.text.name}, "
        f"{np.median([c.tokens_per_s for c in cells.values()]):.0f} tokens/s (median of the cells)\n"
    )
    print(markdown(cells, sinks, windows), end="")


def numbers(text: str) -> list[int]:
    """A comma-separated list of numbers, as an option gives it."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder, a .gguf file or a Hub id")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text")
    parser.add_argument("--tokens", type=int, default=20_000, help="of the text, or all if it has fewer")
    parser.add_argument("--sinks", type=numbers, default=[0, 1, 2, 4, 8], metavar="S,..")
    parser.add_argument("--windows", type=numbers, default=[252, 508, 1020], metavar="W,..")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the results")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except SinkError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
