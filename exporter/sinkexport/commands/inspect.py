"""``sinkexport inspect``: what a bundle holds, which families export, which recipes there are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text
from sinkrt.contract import (
    MANIFEST_NAME,
    MASS_KIND,
    AffineAttention,
    FileFacts,
    HeadWindow,
    Manifest,
    Quantization,
    SinkTuning,
    load_manifest,
)
from sinkrt.errors import UsageError, problem

from sinkexport.config import DEFAULT_NUM_SINK_TOKENS, DEFAULT_WINDOW_SIZE
from sinkexport.families import describe
from sinkexport.util.console import table_console

if TYPE_CHECKING:
    from sinkexport.quant.recipe import Recipe

MB = 1e6


@click.command(name="inspect")
@click.argument("what", metavar="DIR|MODEL|FILE|families|recipes")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable: manifest, model, families or recipes.")
@click.option(
    "--tokenizer-out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Of a model: write its tokenizer into DIR, as a bundle would hold it.",
)
@click.option(
    "--memory",
    is_flag=True,
    help="Memory that decoding takes: of the bundle DIR, or of a model that is not exported yet: a folder "
    "with config.json, a .gguf file or a Hub id.",
)
@click.option(
    "--window",
    "windows",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="W",
    help="With --memory of a model: window size; may be repeated.  [default: 1020]",
)
@click.option("--sink-tokens", type=click.IntRange(min=0), metavar="S", help="With --memory of a model.  [default: 4]")
@click.option("--batch", type=click.IntRange(min=1), metavar="B", help="With --memory of a model.  [default: 1]")
def command(
    what: str,
    as_json: bool,
    tokenizer_out: Path | None,
    memory: bool,
    windows: tuple[int, ...],
    sink_tokens: int | None,
    batch: int | None,
) -> None:
    """Show the bundle DIR, what an export of MODEL (a folder, a .gguf file or a Hub id) would read and refuse, a
    calibration FILE, the table of model families or that of quantisation recipes.
    """
    if tokenizer_out is not None:
        if memory or as_json or not _is_model(what):
            raise UsageError(
                problem(
                    "--tokenizer-out",
                    received="--memory or --json" if memory or as_json else f"'{what}', which is no model",
                    expected="a model, and no other option",
                    fix="leave it out",
                )
            )
        from sinkexport.commands.inspect_model import write_tokenizer_of

        write_tokenizer_of(what, tokenizer_out)
        return
    if memory:
        is_bundle = Path(what, MANIFEST_NAME).exists()
        if is_bundle and (windows or sink_tokens is not None or batch is not None):
            raise UsageError(
                problem(
                    "--window, --sink-tokens, --batch",
                    received=f"with the bundle '{what}'",
                    expected="a model: a bundle has its own",
                    fix="leave them out",
                )
            )
        if is_bundle:
            _show_budget_of_bundle(Path(what), as_json)
        else:
            _show_budgets(
                what,
                windows or (DEFAULT_WINDOW_SIZE,),
                DEFAULT_NUM_SINK_TOKENS if sink_tokens is None else sink_tokens,
                batch or 1,
                as_json,
            )
        return
    if windows or sink_tokens is not None or batch is not None:
        raise UsageError(
            problem(
                "--window, --sink-tokens, --batch",
                received="without --memory",
                expected="--memory",
                fix="add it, or leave them out",
            )
        )
    if what == "families" and not Path(what).exists():
        _show_families(as_json)
        return
    if what == "recipes" and not Path(what).joinpath(MANIFEST_NAME).exists():
        _show_recipes(as_json)
        return
    if _is_model(what):
        from sinkexport.commands.inspect_model import show_model

        show_model(what, as_json)
        return
    bundle = Path(what)
    if not bundle.exists():
        raise UsageError(
            problem(
                "inspect",
                received=f"'{what}', which is not there",
                expected="a bundle, a model (a folder, a .gguf file or a Hub id), a calibration file, "
                "families or recipes",
                fix="check the path",
            )
        )
    if bundle.is_file():
        _show_calibration(bundle, as_json)
        return
    manifest = load_manifest(bundle)
    if as_json:
        click.echo(manifest.to_json(), nl=False)
    else:
        _show_bundle(bundle, manifest)


def _is_model(what: str) -> bool:
    """A .gguf file, a folder with config.json that is no bundle, or what looks like an id of the Hub."""
    path = Path(what)
    if path.is_dir():
        return (path / "config.json").is_file() and not (path / MANIFEST_NAME).exists()
    if path.suffix.lower() == ".gguf":
        return True
    return not path.exists() and what.count("/") == 1 and not what.startswith((".", "~", "/"))


def _show_budget_of_bundle(bundle: Path, as_json: bool) -> None:
    from sinkexport.bench.memory import of_bundle

    manifest = load_manifest(bundle)
    budget = of_bundle(bundle, manifest)
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(budget), "total": budget.total}, indent=1))
        return
    rows = [
        ("weights", budget.weights, "the engines' files" if manifest.engines else "the weights' files"),
        ("sinks", budget.sinks, "the manifest"),
        ("window", budget.window, "the manifest"),
        ("values of a run", budget.values, "shapes in the graphs: most that are alive at once"),
        ("all, for ever", budget.total, ""),
    ]
    table = Table("memory", box=None, pad_edge=False)
    table.add_column("MB", justify="right")
    table.add_column("told by")
    for name, size, source in rows:
        table.add_row(name, f"{size / MB:.1f}", source)
    table_console().print(table)


def _show_budgets(source: str, windows: tuple[int, ...], sinks: int, batch: int, as_json: bool) -> None:
    """A row for each way to export the model."""
    from sinkexport.bench.memory import ModelShape, combinations
    from sinkexport.config import ExportConfig

    shape = ModelShape.load(source)
    rows, table = [], Table("dtype", "weights", "window", box=None, pad_edge=False)
    for header in ("S + W", "weights MB", "cache MB", "values MB", "all MB"):
        table.add_column(header, justify="right")
    for dtype, weights, kv, window in combinations(windows):
        chunk = ExportConfig(num_sink_tokens=sinks, window_size=window).num_tokens_per_chunk
        budget = shape.budget(sinks, window, batch, chunk, dtype=dtype, weights=weights, kv=kv)
        rows.append(
            {
                "dtype": dtype,
                "weights_dtype": weights,
                "kv": kv,
                "window_size": window,
                **dataclasses.asdict(budget),
                "total": budget.total,
            }
        )
        sizes = (budget.weights, budget.sinks + budget.window, budget.values, budget.total)
        table.add_row(
            dtype,
            dtype if weights == "float" else weights,
            dtype if kv == "fp" else kv,
            f"{sinks} + {window}",
            *(f"{size / MB:.1f}" for size in sizes),
        )
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    console = table_console()
    console.print(Text(f"{shape.name}, {batch} stream(s). Weights and cache: counted. Values of a run: estimated."))
    console.print(table)


def _show_families(as_json: bool) -> None:
    families = describe()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(family) for family in families], indent=1))
        return
    headers = ("family", "models", "positions", "layers", "exact", "remark", "tested by")
    table = Table(*headers, box=None, pad_edge=False)
    for family in families:
        table.add_row(
            family.family,
            family.examples,
            family.positions,
            family.layers,
            "yes" if family.exact else "no",
            family.reason,
            ", ".join(family.tested_by),
        )
    table_console().print(table)


def _show_recipes(as_json: bool) -> None:
    from sinkexport.quant.recipe import load_recipe, recipe_names

    recipes = [load_recipe(name) for name in recipe_names()]
    if as_json:
        click.echo(json.dumps([recipe.model_dump() for recipe in recipes], indent=1))
        return
    table = Table("recipe", "weights", "inputs", "output projection", "window", "targets", "", box=None, pad_edge=False)
    for recipe in recipes:
        table.add_row(
            recipe.name,
            _weights(recipe),
            recipe.activations.mode,
            recipe.lm_head,
            recipe.kv,
            _listed(list(recipe.targets)),
            recipe.description,
        )
    table_console().print(table)


def _show_calibration(path: Path, as_json: bool) -> None:
    """A row for each input: how far the rest and the sinks reach, and one range for both."""
    from sinkexport.calibration.file import load_calibration, rounded_path

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
        ("made by", _listed(f"{name} {version}" for name, version in found.producer.items())),
    ]
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        facts.add_row(Text(name, style="bold"), Text(value))
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
    console.print(facts)
    if found.inputs:
        console.print()
        console.print(table)


def _together(modules: tuple[str, ...]) -> str:
    """``model.layers.0.self_attn.{q_proj,k_proj,v_proj}``."""
    parents = {module.rpartition(".")[0] for module in modules}
    if len(modules) == 1 or len(parents) > 1:
        return ", ".join(modules)
    return f"{parents.pop()}.{{{','.join(module.rpartition('.')[2] for module in modules)}}}"


def _weights(recipe: Recipe) -> str:
    weights = recipe.weights
    if weights is None:
        return "float"
    share = "channel" if weights.block_size is None else f"{weights.block_size} inputs"
    return f"int{weights.bits}, a scale per {share}"


def _show_bundle(bundle: Path, manifest: Manifest) -> None:
    model, stream = manifest.model, manifest.stream
    rows = [
        ("model", f"{model.name} ({model.architecture}, {model.num_parameters / 1e6:.1f}M parameters)"),
        (
            "layers",
            f"{model.num_layers} x {model.num_q_heads} query heads, {model.num_kv_heads} key heads of {model.head_dim}",
        ),
        ("vocabulary", f"{model.vocab_size} tokens; end of text: {_listed(model.eos_token_ids)}"),
        ("positions", f"{model.position_scheme}; up to {stream.position_limit:.1e} tokens"),
        (
            "cache",
            f"{stream.num_sink_tokens} sinks + window of {stream.window_size} = {stream.capacity} tokens"
            + (_own_windows(manifest) if manifest.head_windows is None else _windows(manifest.head_windows)),
        ),
        ("streams", f"{stream.batch}"),
        ("target", manifest.target + (f", plugin {manifest.plugin_abi}" if manifest.plugin_abi else "")),
        *(
            (
                f"{role} engine",
                f"{engine.file}, {engine.flavour} {engine.version}, {engine.gpu or 'any GPU it supports'}",
            )
            for role, engine in sorted((manifest.engines or {}).items())
        ),
        ("quantised", _quantised(manifest.quantization)),
        *_tuned(manifest.sink_tuning),
        *_affine(manifest.affine_attention),
        *(
            (f"{role} graph", f"{graph.file}, {graph.num_tokens} token(s) a run")
            for role, graph in manifest.graphs.items()
        ),
        (
            "tokenizer",
            "none: token ids only"
            if manifest.tokenizer is None
            else manifest.tokenizer.file + (", chat template" if manifest.tokenizer.chat_template else ""),
        ),
        ("made by", _listed(f"{name} {version}" for name, version in manifest.producer.items())),
    ]
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        facts.add_row(Text(name, style="bold"), Text(value))  # Text: names may hold what rich takes for markup
    console = table_console()
    for table in (facts, _memory(manifest), _files(bundle, manifest)):
        console.print(table)
        console.print()


def _own_windows(manifest: Manifest) -> str:
    """Of the layers that keep a sliding window of their own instead of sinks and window."""
    keep_sinks = {state.layer for state in manifest.states if state.kind == "sink_k"}
    windows = [s.shape[2] for s in manifest.states if s.kind == "window_k" and s.layer not in keep_sinks]
    own = [size for size in windows if manifest.stream.num_sink_tokens or size != manifest.stream.window_size]
    return f"; {len(own)} layers with a window of their own, {_listed(tuple(sorted(set(own))))}" if own else ""


def _quantised(facts: Quantization | None) -> str:
    if facts is None:
        return "no"
    lines = [f"{facts.recipe}: {facts.weights} weights, {facts.activations} inputs, {facts.kv} window"]
    if facts.calibration_sha256 is not None:
        lines.append(f"calibration file {facts.calibration_sha256[:16]}")
    if facts.thresholds:  # 'sinkexport verify' holds the bundle to them
        lines.append(_listed(f"{name} {limit:g}" for name, limit in sorted(facts.thresholds.items())))
    return "\n".join(lines)


def _windows(groups: tuple[HeadWindow, ...]) -> str:
    """How many key heads have which window."""
    counts: dict[int, int] = {}
    for group in groups:
        counts[group.window_size] = counts.get(group.window_size, 0) + len(group.kv_heads)
    return "\nkey heads by window: " + _listed(f"{counts[window]} with {window}" for window in sorted(counts))


def _tuned(tuning: SinkTuning | None) -> list[tuple[str, str]]:
    if tuning is None:
        return []
    factors = [factor for layer in tuning.first_token_scale for factor in layer if factor != 1]
    span = f", {min(factors):g} .. {max(factors):g}" if factors else ""
    total = sum(len(layer) for layer in tuning.first_token_scale)
    rows = [("tuned sinks", f"{len(factors)} of {total} heads{span}; file {tuning.sha256[:16]}")]
    if (act := tuning.act) is not None:
        rows.append(
            (
                "later sinks",
                f"scaled down to {act.beta:g} in {sum(map(sum, act.heads))} of {total} heads, from "
                f"{act.alpha:g} times the mean and {act.min_queries} queries on",
            )
        )
    return rows


def _affine(facts: AffineAttention | None) -> list[tuple[str, str]]:
    if facts is None:
        return []
    layers = sum(bool(heads) for heads in facts.heads)
    kind = "by hidden state" if facts.has_inputs else "constant"
    return [
        ("affine attention", f"{sum(map(len, facts.heads))} heads in {layers} layers, {kind}; file {facts.sha256[:16]}")
    ]


def _memory(manifest: Manifest) -> Table:
    """Bytes that decoding holds; they are all there is, however long the stream."""
    table = Table("memory", "dtype", box=None, pad_edge=False)
    table.add_column("MB", justify="right")
    weights = manifest.weights_dtype if manifest.quantization is None else manifest.quantization.weights
    table.add_row("weights", weights, f"{manifest.weights_bytes / MB:.1f}")
    for label, kind in (
        ("sink keys and values", "sink"),
        ("window keys and values", "window"),
        ("attention received", MASS_KIND),
        ("convolutions", "conv"),
        ("recurrent states", "recurrent"),
    ):
        states = [state for state in manifest.states if state.kind.startswith(kind)]
        if states:
            dtypes = _listed(sorted({state.dtype for state in states}))
            table.add_row(label, dtypes, f"{sum(state.nbytes for state in states) / MB:.1f}")
    table.add_row("all, for ever", "", f"{(manifest.weights_bytes + manifest.state_bytes) / MB:.1f}")
    return table


def _files(bundle: Path, manifest: Manifest) -> Table:
    table = Table("file", box=None, pad_edge=False)
    table.add_column("bytes", justify="right")
    table.add_column("sha256")
    table.add_column("")
    for name, facts in sorted(manifest.files.items()):
        table.add_row(Text(name), f"{facts.bytes:,}", facts.sha256[:16], _condition(bundle / name, facts))
    return table


def _condition(path: Path, facts: FileFacts) -> str:
    """Whether the file is there in full; `run` and `verify` compare the hashes as well."""
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    return "" if size == facts.bytes else f"has {size:,} bytes"


def _listed(items: Iterator[str] | tuple[int, ...] | list[str]) -> str:
    return ", ".join(str(item) for item in items) or "none"
