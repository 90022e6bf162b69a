"""``sinkexport inspect``: what a bundle holds, or which families export."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from sinkrt.contract import Manifest, load_manifest

from sinkexport.families import describe

MB = 1e6


@click.command(name="inspect")
@click.argument("what", metavar="DIR|families")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def command(what: str, as_json: bool) -> None:
    """Show a bundle, or the table of model families."""
    if what == "families" and not Path(what).exists():
        _show_families(as_json)
        return
    manifest = load_manifest(Path(what))
    if as_json:
        click.echo(manifest.to_json(), nl=False)
    else:
        _show_bundle(manifest)


def _show_families(as_json: bool) -> None:
    families = describe()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(family) for family in families], indent=1))
        return
    table = Table("family", "models", "positions", "exports", "remark")
    for family in families:
        table.add_row(family.family, family.examples, family.positions, "yes" if family.exact else "no", family.reason)
    Console().print(table)


def _show_bundle(manifest: Manifest) -> None:
    model, stream = manifest.model, manifest.stream
    files = {name: facts.bytes for name, facts in manifest.files.items()}
    weights = sum(size for name, size in files.items() if name.startswith("weights"))
    per_token = sum(state.nbytes // state.shape[2] for state in manifest.states if state.kind.startswith("window"))
    rows = [
        ("model", f"{model.name} ({model.architecture}, {model.num_parameters / 1e6:.1f}M parameters)"),
        ("layers", f"{model.num_layers} x {model.num_q_heads} query heads, {model.num_kv_heads} key heads "
                   f"of {model.head_dim}"),
        ("positions", f"{model.position_scheme}; up to {stream.position_limit:.1e} tokens"),
        ("cache", f"{stream.num_sink_tokens} sinks + window of {stream.window_size} = {stream.capacity} tokens, "
                  f"{stream.batch} stream(s)"),
        ("weights", f"{weights / MB:.1f} MB, {manifest.weights_dtype}"),
        ("state", f"{manifest.state_bytes / MB:.1f} MB for ever ({per_token / 1e3:.1f} kB a token of window)"),
        ("graphs", ", ".join(f"{role}: {g.file}, {g.num_tokens} token(s) a run"
                             for role, g in manifest.graphs.items())),
        ("target", manifest.target),
        ("tokenizer", "none: token ids only" if manifest.tokenizer is None else
         manifest.tokenizer.file + (", chat template" if manifest.tokenizer.chat_template else "")),
        ("files", ", ".join(f"{name} {size / MB:.1f} MB" for name, size in sorted(files.items()))),
        ("made by", ", ".join(f"{name} {version}" for name, version in manifest.producer.items())),
    ]  # fmt: skip
    table = Table(show_header=False, box=None)
    for name, value in rows:
        table.add_row(f"[bold]{name}[/bold]", value)
    Console().print(table)
