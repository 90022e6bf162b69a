"""``sinkexport analyze``: where a model's attention sinks are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text
from sinkrt.errors import UsageError, problem

from sinkexport.console import table_console
from sinkexport.files import check_writable, read_text, write_whole
from sinkexport.plot import png
from sinkexport.progress import shown_progress

if TYPE_CHECKING:
    from sinkexport.analyze import SinkReport

STAGES = {"load": "Loading the model", "windows": "Measuring attention"}
SHOWN = 12
"""Rows of a table; the JSON file has them all."""


@click.command(name="analyze")
@click.argument("model")
@click.option("--text", "text_file", required=True, type=click.Path(path_type=Path), metavar="FILE",
              help="UTF-8 text like that which the model will stream.")  # fmt: skip
@click.option("--windows", type=int, default=8, show_default=True, metavar="N", help="Windows of text to measure.")
@click.option("--window-tokens", type=int, default=1024, show_default=True, metavar="N", help="Tokens of each.")
@click.option("--candidates", type=int, default=16, show_default=True, metavar="N",
              help="First tokens that may be sinks.")  # fmt: skip
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write all figures.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), metavar="FILE", help="Write a PNG image.")
def command(
    model: str, text_file: Path, windows: int, window_tokens: int, candidates: int, json_file: Path | None,
    plot_file: Path | None,
) -> None:  # fmt: skip
    """Find the attention sinks of MODEL (a local directory, a .gguf file or a Hub id).

    Tells how much attention the first tokens draw, which later tokens draw it too, and how many sinks to export with.
    """
    text = read_text(text_file, "--text")
    for path, option in ((json_file, "--json"), (plot_file, "--plot")):
        if path is not None:
            check_writable(path, option)
    if plot_file is not None:
        from sinkexport.analyze_plot import draw  # if matplotlib is missing, that should not show at the end
    from sinkexport.analyze import analyze
    from sinkexport.sources import load_model

    with shown_progress(STAGES) as show:
        show("load", 0, 1)
        loaded = load_model(model)
        if loaded.tokenizer is None:
            raise UsageError(problem("model", received="one without a tokenizer", expected="a tokenizer for the text",
                                     fix="use a complete model folder"))  # fmt: skip
        # No more than is needed: a book takes seconds.
        ids = loaded.tokenizer(text[: 32 * windows * window_tokens])["input_ids"]
        report = analyze(
            loaded, ids, num_windows=windows, window_tokens=window_tokens, num_candidates=candidates, report=show
        )
    if json_file is not None:
        write_whole(json_file, report.to_json(), "--json")
    if plot_file is not None:
        write_whole(plot_file, png(draw(report)), "--plot")
    _print_report(model, report)


def _print_report(model: str, report: SinkReport) -> None:
    console = table_console()
    console.print(
        f"{report.model}: {report.num_windows} windows of {report.window_tokens:,} tokens; attention from afar on any "
        f"other token: {report.base:.3%}",
        markup=False,
        soft_wrap=True,
    )
    first = Table("first token", box=None, pad_edge=False)
    first.add_column("attention from afar", justify="right")
    first.add_column("sink in heads", justify="right")
    for k, (mass, share) in enumerate(zip(report.mass_by_position, report.sink_share, strict=True)):
        if k < max(4, report.recommended) or mass > 2 * report.base:
            first.add_row(str(k), f"{mass:.2%}", f"{share:.1%}")
    console.print(first)
    if report.secondary:
        later = Table("secondary sink", box=None, pad_edge=False)
        for header in ("times", "windows", "heads", "layers", "largest weight", "first at"):
            later.add_column(header, justify="right")
        for sink in report.secondary[:SHOWN]:
            layers = f"{sink.layers[0]} .. {sink.layers[-1]}" if len(sink.layers) > 1 else str(sink.layers[0])
            later.add_row(Text(repr(sink.text)), str(sink.times), str(sink.windows), str(sink.heads), layers,
                          f"{sink.weight:.1%}", f"{sink.positions[0]:,}")  # fmt: skip
        console.print()
        console.print(later)
        if len(report.secondary) > SHOWN:
            console.print(f"and {len(report.secondary) - SHOWN} more")
    console.print()
    click.echo(f"keep {report.recommended}: {report.reason}")
    click.echo(f"sinkexport export {model} -o DIR --sink-tokens {report.recommended}")
