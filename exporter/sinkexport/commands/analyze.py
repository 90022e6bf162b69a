"""``sinkexport analyze``: where a model's attention sinks are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sinkexport.analysis.defaults import LONG_SHARE, NUM_CANDIDATES, NUM_WINDOWS, SHORT_WINDOW, WINDOW_TOKENS
from sinkexport.commands.options import (
    RenamedOption,
    file_option,
    json_option,
    number_option,
    plot_option,
    refuse_same_file,
    text_option,
)
from sinkexport.config import DEFAULT_WINDOW_SIZE
from sinkexport.util.console import table_console
from sinkexport.util.files import check_writable, read_text, write_whole
from sinkexport.util.plot import png
from sinkexport.util.progress import shown_progress

if TYPE_CHECKING:
    from sinkexport.analysis.sinks import SinkReport

STAGES = {"load": "Loading the model", "layers": "Measuring layers"}
SHOWN = 12
"""Rows of a table; the JSON file has them all."""
BYTES_PER_TOKEN = 64
"""Bytes of text that are read for a token: far more than tokens have on average, so only a short text is too short."""


@click.command(name="analyze")
@click.argument("model")
@text_option()
@number_option("--windows", NUM_WINDOWS, "Windows of text to measure.")
@number_option("--window-tokens", WINDOW_TOKENS, "Tokens of each.")
@number_option("--candidates", NUM_CANDIDATES, "First tokens that may be sinks.")
@file_option(
    "--head-windows",
    "head_windows_file",
    cls=RenamedOption,
    former="--budgets",
    help="Propose windows of single key heads, for 'sinkexport export --head-windows'.",
)
@number_option(
    "--long-window", DEFAULT_WINDOW_SIZE, "With --head-windows: window of the heads that need it most.", metavar="W"
)
@number_option("--short-window", SHORT_WINDOW, "With --head-windows: window of the others.", metavar="W")
@number_option(
    "--head-window-share",
    LONG_SHARE,
    "With --head-windows: memory of the windows, as a share of what they would take if all were long.",
    metavar="X",
    cls=RenamedOption,
    former="--budget-share",
)
@file_option(
    "--sink-tuning",
    "tuning_file",
    help="Propose heads to scale later sinks down in, for 'sinkexport export --sink-tuning'.",
)
@json_option("Write all figures.")
@plot_option("Write a PNG image.")
def command(
    model: str,
    text_file: Path,
    windows: int,
    window_tokens: int,
    candidates: int,
    head_windows_file: Path | None,
    long_window: int,
    short_window: int,
    head_window_share: float,
    tuning_file: Path | None,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Find the attention sinks of MODEL (a local directory, a .gguf file or a Hub id).

    Shows how much attention the first tokens draw, which later tokens draw it too, and how many sinks to export with.
    --head-windows also shows which heads need a long window (docs/head_windows.md), and --sink-tuning which ones look
    at later sinks (docs/sink_tuning.md).
    """
    files = {
        "--json": json_file,
        "--plot": plot_file,
        "--head-windows": head_windows_file,
        "--sink-tuning": tuning_file,
    }
    refuse_same_file(files)
    for option, path in files.items():
        if path is not None:
            check_writable(path, option)
    if plot_file is not None:
        from sinkexport.analysis.plot import draw  # if matplotlib is missing, that should not show at the end
    text = read_text(text_file, "--text", BYTES_PER_TOKEN * max(windows, 1) * max(window_tokens, 1))
    from sinkexport.analysis.sinks import check_geometry

    check_geometry(windows, window_tokens, candidates)
    if head_windows_file is not None:
        from sinkexport.analysis.proposals import check_proposal

        check_proposal(long_window, short_window, head_window_share)
    architecture, report = _measured(model, text, windows, window_tokens, candidates)
    proposals = []
    if head_windows_file is not None:
        proposals.append(
            _propose_head_windows(report, architecture, head_windows_file, long_window, short_window, head_window_share)
        )
    if tuning_file is not None:
        proposals.append(_propose_tuning(report, architecture, tuning_file))
    if json_file is not None:
        write_whole(json_file, report.to_json(), "--json")
    if plot_file is not None:
        write_whole(plot_file, png(draw(report)), "--plot")
    _print_report(model, report)
    for line in proposals:
        click.echo(line)


def _measured(
    model: str, text: str, num_windows: int, window_tokens: int, num_candidates: int
) -> tuple[str, SinkReport]:
    """Load and measure the model. Returns: its class's name, and the report."""
    from sinkexport.analysis.sinks import analyze
    from sinkexport.analysis.text_windows import text_windows
    from sinkexport.sources import load_model

    with shown_progress(STAGES) as show:
        show("load", 0, 1)
        loaded = load_model(model)
        windows = text_windows(loaded.text_tokenizer(), text, num_windows, window_tokens)
        return type(loaded.model).__name__, analyze(loaded, windows, num_candidates=num_candidates, report=show)


def _propose_head_windows(
    report: SinkReport, architecture: str, file: Path, long_window: int, short_window: int, share: float
) -> str:
    """Write the proposal. Returns: a line that describes it."""
    from sinkexport.analysis.proposals import propose_head_windows

    proposed, lost = propose_head_windows(report, architecture, longest=long_window, shortest=short_window, share=share)
    write_whole(file, proposed.to_json(), "--head-windows")
    long = sum(window == long_window for layer in proposed.windows for window in layer)
    total = proposed.model.num_layers * proposed.model.num_kv_heads
    return (
        f"{file}: {long} of {total} key heads keep {long_window:,} tokens, the others {short_window:,}, which changes "
        f"no head's output by more than {lost:.1%}; add --window {long_window} --head-windows {file}"
    )


def _propose_tuning(report: SinkReport, architecture: str, file: Path) -> str:
    """Write the proposal. Returns: a line that describes it."""
    from sinkexport.analysis.proposals import propose_sink_tuning

    tuning = propose_sink_tuning(report, architecture)
    write_whole(file, tuning.to_json(), "--sink-tuning")
    return f"{file}: {tuning.found.partition(': ')[2]}; add --sink-tuning {file}"


def _print_report(model: str, report: SinkReport) -> None:
    console = table_console()
    begins = f", each after {''.join(report.beginning)!r}" if report.beginning else ""
    console.print(
        f"{report.model}: {report.num_windows} windows of {report.window_tokens:,} tokens{begins}; attention from afar "
        f"on any other token: {report.base:.3%}",
        markup=False,
        soft_wrap=True,
    )
    for table in (_first_tokens(report), _layers(report)):
        console.print(table)
        console.print()
    if report.secondary:
        _print_secondary(console, report)
    click.echo(f"keep {report.recommended}: {report.reason}")
    if report.sliding_window is not None and report.sliding_window < report.window_tokens:
        click.echo(
            f"note: layers of this model look back {report.sliding_window:,} tokens, where a bundle always sees its "
            f"sinks; --window-tokens {report.sliding_window} measures that",
            err=True,
        )
    click.echo(f"sinkexport export {model} -o DIR --sink-tokens {report.recommended}")


def _first_tokens(report: SinkReport) -> Table:
    table = Table("first token", box=None, pad_edge=False)
    table.add_column("attention from afar", justify="right")
    table.add_column(f"alpha > {report.epsilon:g} in heads", justify="right")
    for k, (mass, share) in enumerate(zip(report.mass_by_position, report.sink_share, strict=True)):
        if k < max(4, report.recommended) or mass > 2 * report.base:
            table.add_row(str(k), f"{mass:.2%}", f"{share:.1%}")
    return table


def _layers(report: SinkReport) -> Table:
    """Make the table of layers: a row is a mean over neighbouring layers, at most `SHOWN` rows."""
    kept = max(1, report.recommended)
    table = Table("layers", box=None, pad_edge=False)
    for header in (f"on the first {kept}", "heads with a sink", "key norm", "value norm", "secondary sinks"):
        table.add_column(header, justify="right")
    num_layers = len(report.mass)
    masses, step = report.mass_of_first(kept).mean(axis=1), -(-num_layers // SHOWN)
    for start in range(0, num_layers, step):
        rows = range(start, min(start + step, num_layers))
        secondary = sum(sink.is_like_first and any(i in rows for i in sink.layers) for sink in report.secondary)
        table.add_row(
            _span(tuple(rows)),
            f"{sum(masses[i] for i in rows) / len(rows):.1%}",
            f"{sum(report.layer_sinks[i] for i in rows) / len(rows):.0%}",
            f"{sum(report.key_norm[i][0] for i in rows) / len(rows):.2f}",
            f"{sum(report.value_norm[i][0] for i in rows) / len(rows):.2f}",
            str(secondary),
        )
    return table


def _print_secondary(console: Console, report: SinkReport) -> None:
    table = Table("later token", box=None, pad_edge=False)
    for header in ("times", "windows", "heads", "layers", "largest weight", "at", "value norm", "likeness", "kind"):
        table.add_column(header, justify="right")
    for sink in report.secondary[:SHOWN]:
        top = sink.sightings[0]
        table.add_row(
            Text(repr(sink.text)),
            str(sink.times),
            str(sink.windows),
            str(sink.heads),
            _span(sink.layers),
            f"{top.weight:.1%}",
            f"{top.position:,}",
            f"{top.value_norm:.2f}",
            f"{top.likeness:.2f}",
            "sink" if sink.is_like_first else "content",
        )
    console.print(table)
    if len(report.secondary) > SHOWN:
        console.print(f"and {len(report.secondary) - SHOWN} more")
    console.print()


def _span(layers: tuple[int, ...]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]} .. {layers[-1]}"
