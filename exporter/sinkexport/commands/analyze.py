"""``sinkexport analyze``: where a model's attention sinks are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sinkrt.errors import UsageError, problem

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
"""Of text that is read: far more than tokens have on average, so what was read is too short only if the text is."""


@click.command(name="analyze")
@click.argument("model")
@click.option(
    "--text",
    "text_file",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="UTF-8 text like that which the model will stream.",
)
@click.option("--windows", type=int, default=8, show_default=True, metavar="N", help="Windows of text to measure.")
@click.option("--window-tokens", type=int, default=1024, show_default=True, metavar="N", help="Tokens of each.")
@click.option(
    "--candidates", type=int, default=16, show_default=True, metavar="N", help="First tokens that may be sinks."
)
@click.option(
    "--budgets",
    "budgets_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Propose windows of single key heads, for 'sinkexport export --budgets'.",
)
@click.option(
    "--long-window",
    type=int,
    default=DEFAULT_WINDOW_SIZE,
    show_default=True,
    metavar="W",
    help="With --budgets: of the heads that need it most.",
)
@click.option(
    "--short-window", type=int, default=128, show_default=True, metavar="W", help="With --budgets: of the others."
)
@click.option(
    "--budget-share",
    type=float,
    default=0.5,
    show_default=True,
    metavar="X",
    help="With --budgets: memory of the windows, of what they would take if all were long.",
)
@click.option(
    "--sink-tuning",
    "tuning_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Propose heads to scale later sinks down in, for 'sinkexport export --sink-tuning'.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write all figures.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), metavar="FILE", help="Write a PNG image.")
def command(
    model: str,
    text_file: Path,
    windows: int,
    window_tokens: int,
    candidates: int,
    budgets_file: Path | None,
    long_window: int,
    short_window: int,
    budget_share: float,
    tuning_file: Path | None,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Find the attention sinks of MODEL (a local directory, a .gguf file or a Hub id).

    Tells how much attention the first tokens draw, which later tokens draw it too, and how many sinks to export with.
    With --budgets it also tells which heads need a long window (docs/budgets.md), with --sink-tuning which ones look at
    later sinks (docs/sink_tuning.md).
    """
    if json_file is not None and plot_file is not None and json_file.resolve() == plot_file.resolve():
        raise UsageError(
            problem(
                "--plot", received=f"'{plot_file}', as --json", expected="a file of its own", fix="choose another path"
            )
        )
    for path, option in (
        (json_file, "--json"),
        (plot_file, "--plot"),
        (budgets_file, "--budgets"),
        (tuning_file, "--sink-tuning"),
    ):
        if path is not None:
            check_writable(path, option)
    if plot_file is not None:
        from sinkexport.analysis.plot import draw  # if matplotlib is missing, that should not show at the end
    text = read_text(text_file, "--text", BYTES_PER_TOKEN * max(windows, 1) * max(window_tokens, 1))
    from sinkexport.analysis.sinks import analyze, check_geometry, text_windows
    from sinkexport.sources import load_model

    check_geometry(windows, window_tokens, candidates)
    if budgets_file is not None:
        from sinkexport.variants.head_windows import check_proposal, propose

        check_proposal(long_window, short_window, budget_share)
    with shown_progress(STAGES) as show:
        show("load", 0, 1)
        loaded = load_model(model)
        if loaded.tokenizer is None:
            raise UsageError(
                problem(
                    "model",
                    received="one without a tokenizer",
                    expected="a tokenizer for the text",
                    fix="use a complete model folder",
                )
            )
        pieces = text_windows(loaded.tokenizer, text, windows, window_tokens)
        report = analyze(loaded, pieces, num_candidates=candidates, report=show)
    proposed = None
    if budgets_file is not None:
        proposed, lost = propose(
            report, type(loaded.model).__name__, longest=long_window, shortest=short_window, share=budget_share
        )
        write_whole(budgets_file, proposed.to_json(), "--budgets")
    tuning = None
    if tuning_file is not None:
        from sinkexport.variants.sink_tuning import propose as propose_tuning

        tuning = propose_tuning(report, type(loaded.model).__name__)
        write_whole(tuning_file, tuning.to_json(), "--sink-tuning")
    if json_file is not None:
        write_whole(json_file, report.to_json(), "--json")
    if plot_file is not None:
        write_whole(plot_file, png(draw(report)), "--plot")
    _print_report(model, report)
    if proposed is not None:
        long = sum(window == long_window for layer in proposed.windows for window in layer)
        total = proposed.model.num_layers * proposed.model.num_kv_heads
        click.echo(
            f"{budgets_file}: {long} of {total} key heads keep {long_window:,} tokens, the others "
            f"{short_window:,}, which changes no head's output by more than {lost:.1%}; "
            f"add --window {long_window} --budgets {budgets_file}"
        )
    if tuning is not None:
        click.echo(f"{tuning_file}: {tuning.found.partition(': ')[2]}; add --sink-tuning {tuning_file}")


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
    if report.own_window is not None and report.own_window < report.window_tokens:
        click.echo(
            f"note: layers of this model look back {report.own_window:,} tokens, where a bundle always sees its "
            f"sinks; --window-tokens {report.own_window} measures that",
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
    """A row for some neighbouring layers, means over them: `SHOWN` rows at most."""
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
