"""Show a calibration file."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from sinkexport.calibration.file import load_calibration, rounded_path
from sinkexport.util.console import facts_table, listed, table_console


def show_calibration(path: Path, as_json: bool) -> None:
    """Print a row for each input: how far sinks and other tokens reach, and one range for both."""
    found = load_calibration(path)
    if as_json:
        click.echo(found.to_json(), nl=False)
        return
    asked, weights = found.calibration, found.rounded_weights
    how = [asked.method if asked.percentile is None else f"{asked.method} {asked.percentile:g}"] if asked.method else []
    how += [f"smoothed, alpha {found.smooth.alpha:g}"] if found.smooth else []
    how += [f"weights rounded for their inputs, in {rounded_path(path).name}"] if weights else []
    rows = [
        ("model", f"{found.model.name} ({found.model.architecture}, {found.model.fingerprint[:16]})"),
        ("recipe", f"{found.recipe}: {', '.join(how)}"),
        (
            "text",
            f"{asked.samples} pieces of {asked.length:,} tokens of {found.text.tokens:,} "
            f"(seed {asked.seed}, {found.text.sha256[:16]})",
        ),
        ("cache", f"{asked.sink_tokens} sinks + window of {asked.window}"),
        ("made by", listed(f"{name} {version}" for name, version in found.producer.items())),
    ]
    table = Table("input of", box=None, pad_edge=False)
    for header in ("largest", "range", "sinks", "all in one", "widest divisor"):
        table.add_column(header, justify="right")
    for one in found.inputs:
        table.add_row(
            Text(_together(one.modules)),
            f"{one.rest.highest:.4g}",
            f"{one.rest.range:.4g}",
            "-" if one.sinks is None else f"{one.sinks.range:.4g}",
            f"{one.all.range:.4g}",
            "-" if one.divisors is None else f"{max(one.divisors):.3g}",
        )
    console = table_console()
    console.print(facts_table(rows))
    if found.inputs:
        console.print()
        console.print(table)


def _together(modules: tuple[str, ...]) -> str:
    """Name modules together, as ``model.layers.0.self_attn.{q_proj,k_proj,v_proj}``."""
    parents = {module.rpartition(".")[0] for module in modules}
    if len(modules) == 1 or len(parents) > 1:
        return ", ".join(modules)
    return f"{parents.pop()}.{{{','.join(module.rpartition('.')[2] for module in modules)}}}"
