"""Show the memory that decoding takes, of a bundle or of a model that is not exported yet."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text
from sinkrt.contract import load_manifest

from sinkexport.util.console import megabytes, table_console


def show_memory_of_bundle(bundle: Path, as_json: bool) -> None:
    """Print the memory of a bundle, as its files have it."""
    from sinkexport.bench.memory import bundle_memory

    manifest = load_manifest(bundle)
    memory = bundle_memory(bundle, manifest)
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(memory), "total": memory.total}, indent=1))
        return
    rows = [
        ("weights", memory.weights, "the engines' files" if manifest.engines else "the weights' files"),
        ("sinks", memory.sinks, "the manifest"),
        ("window", memory.window, "the manifest"),
        ("recurrent states", memory.recurrent, "the manifest"),
        ("values of a run", memory.values, "shapes in the graphs: most that are alive at once"),
        ("all, forever", memory.total, ""),
    ]
    table = Table("memory", box=None, pad_edge=False)
    table.add_column("MB", justify="right")
    table.add_column("source")
    for name, size, source in rows:
        if not size and (name == "recurrent states" or not manifest.caches):
            continue
        table.add_row(name, megabytes(size), source)
    table_console().print(table)


def show_memory_of_model(source: str, windows: Sequence[int], sinks: int, batch: int, as_json: bool) -> None:
    """Print the memory of a model, a row for each way to export it."""
    from sinkexport.bench.memory import ModelShape, combinations
    from sinkexport.config import ExportConfig

    shape = ModelShape.load(source)
    rows, table = [], Table("dtype", "weights", "window", box=None, pad_edge=False)
    for header in ("S + W", "weights MB", "cache MB", "values MB", "all MB"):
        table.add_column(header, justify="right")
    for dtype, weights, kv, window in combinations(windows):
        chunk = ExportConfig(num_sink_tokens=sinks, window_size=window).num_tokens_per_chunk
        memory = shape.memory(sinks, window, batch, chunk, dtype=dtype, weights=weights, kv=kv)
        rows.append(
            {
                "dtype": dtype,
                "weights_dtype": weights,
                "kv": kv,
                "window_size": window,
                **dataclasses.asdict(memory),
                "total": memory.total,
            }
        )
        sizes = (memory.weights, memory.sinks + memory.window, memory.values, memory.total)
        table.add_row(
            dtype,
            dtype if weights == "float" else weights,
            dtype if kv == "fp" else kv,
            f"{sinks} + {window}",
            *(megabytes(size) for size in sizes),
        )
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    console = table_console()
    console.print(Text(f"{shape.name}, {batch} stream(s). Weights and cache: counted. Values of a run: estimated."))
    console.print(table)
