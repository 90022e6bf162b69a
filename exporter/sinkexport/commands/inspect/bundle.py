"""Show a bundle: model, geometry, memory and files."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table
from rich.text import Text
from sinkrt.contract import (
    MASS_KIND,
    RECURRENT_KINDS,
    AffineAttention,
    AttentionCache,
    FileFacts,
    HeadWindow,
    Manifest,
    Quantization,
    SinkTuning,
)

from sinkexport.util.console import counted, facts_table, listed, megabytes, table_console


def show_bundle(bundle: Path, manifest: Manifest) -> None:
    """Print what the bundle holds."""
    console = table_console()
    for table in (facts_table(_facts(manifest)), _memory(manifest), _files(bundle, manifest)):
        console.print(table)
        console.print()


def _facts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of what the manifest says."""
    model, stream = manifest.model, manifest.stream
    yield "model", f"{model.name} ({model.architecture}, {model.num_parameters / 1e6:.1f}M parameters)"
    yield "layers", _layers(manifest)
    yield "vocabulary", f"{model.vocab_size} tokens; end of text: {listed(model.eos_token_ids)}"
    yield "positions", f"{model.position_scheme}; up to {stream.position_limit:.1e} tokens"
    yield "cache", _cache(manifest)
    if manifest.is_recurrent:
        yield "recurrent", _recurrent(manifest)
    yield "streams", f"{stream.batch}"
    yield (
        "target",
        manifest.target
        + (
            f", {'plugin' if manifest.has_tensorrt_plugin else 'library'} {manifest.plugin_abi}"
            if manifest.plugin_abi
            else ""
        ),
    )
    for role, engine in sorted((manifest.engines or {}).items()):
        built_for = engine.gpu or "any GPU it supports"
        yield f"{role} engine", f"{engine.file}, {engine.flavour} {engine.version}, {built_for}"
    yield "quantised", _quantised(manifest.quantization)
    yield from _tuned(manifest.sink_tuning)
    yield from _affine(manifest.affine_attention)
    for role, graph in manifest.graphs.items():
        yield f"{role} graph", f"{graph.file}, {graph.num_tokens} token(s) a run"
    tokenizer = manifest.tokenizer
    template = ", chat template" if tokenizer is not None and tokenizer.chat_template else ""
    yield "tokenizer", "none: token ids only" if tokenizer is None else tokenizer.file + template
    yield "made by", listed(f"{name} {version}" for name, version in manifest.producer.items())


def _layers(manifest: Manifest) -> str:
    """Describe the heads: of all layers alike, or the kinds of layers and a line for each size."""
    num_layers, caches = manifest.model.num_layers, manifest.caches
    lines = [f"{count} x {sizes}" for sizes, count in collections.Counter(map(_sizes, caches)).items()]
    attending = {cache.layer for cache in caches}
    if len(lines) == 1 and len(attending) == len(caches) == num_layers:
        return lines[0]
    recurrent = {state.layer for state in manifest.states if state.kind in RECURRENT_KINDS} - attending
    calls = "" if len(caches) == len(attending) else f" ({len(caches)} calls)"
    kinds = {
        f"with attention{calls}": len(attending),
        "recurrent": len(recurrent),
        "without a state (they read an earlier layer's cache, or need none)": num_layers - len(attending | recurrent),
    }
    return "\n".join([f"{num_layers}: " + listed(f"{n} {kind}" for kind, n in kinds.items() if n), *lines])


def _sizes(cache: AttentionCache) -> str:
    if cache.latent:
        return f"{cache.num_q_heads} query heads over latent rows of {cache.key_dim} ({cache.value_dim} of them values)"
    values = "" if cache.value_dim == cache.key_dim else f", values of {cache.value_dim}"
    return f"{cache.num_q_heads} query heads, {cache.num_kv_heads} key heads of {cache.key_dim}{values}"


def _cache(manifest: Manifest) -> str:
    """Describe what attention keeps."""
    stream = manifest.stream
    if not manifest.caches:
        return "none: no attention, constant state"
    windows = _sliding_windows(manifest) if manifest.head_windows is None else _head_windows(manifest.head_windows)
    tokens = f"{stream.num_sink_tokens} sinks + window of {stream.window_size} = {stream.capacity} tokens{windows}"
    return f"{tokens}\n{sum(map(_numbers, manifest.caches)):,} numbers a token, all layers together"


def _numbers(cache: AttentionCache) -> int:
    """Count the elements that a cache keeps of one token."""
    return cache.key_dim if cache.latent else cache.num_kv_heads * (cache.key_dim + cache.value_dim)


def _recurrent(manifest: Manifest) -> str:
    """Count the layers with recurrent states, those that have a cache besides, and the bytes."""
    states = [state for state in manifest.states if state.kind in RECURRENT_KINDS]
    layers = {state.layer for state in states}
    both = layers & {cache.layer for cache in manifest.caches}
    beside = f", {len(both)} of them beside a cache" if both else ""
    size = megabytes(sum(state.nbytes for state in states) // manifest.stream.batch)
    return f"constant state in {counted(len(layers), 'layer')}{beside}; {size} MB a stream"


def _sliding_windows(manifest: Manifest) -> str:
    """Describe the caches that keep the model's sliding window instead of sinks and window."""
    names = {state.input for state in manifest.states}
    windows = [
        state.shape[2]
        for state in manifest.states
        if state.kind == "window_k" and state.input.replace("window_k", "sink_k", 1) not in names
    ]
    own = [size for size in windows if manifest.stream.num_sink_tokens or size != manifest.stream.window_size]
    sizes = " or ".join(map(str, sorted(set(own))))
    return f"; {counted(len(own), 'layer')} with a sliding window of {sizes}" if own else ""


def _quantised(facts: Quantization | None) -> str:
    if facts is None:
        return "no"
    lines = [f"{facts.recipe}: {facts.weights} weights, {facts.activations} inputs, {facts.kv} window"]
    if facts.calibration_sha256 is not None:
        lines.append(f"calibration file {facts.calibration_sha256[:16]}")
    if facts.thresholds:  # 'sinkexport verify' holds the bundle to them
        lines.append(listed(f"{name} {limit:g}" for name, limit in sorted(facts.thresholds.items())))
    return "\n".join(lines)


def _head_windows(groups: tuple[HeadWindow, ...]) -> str:
    """Count the key heads of each window."""
    counts: dict[int, int] = {}
    for group in groups:
        counts[group.window_size] = counts.get(group.window_size, 0) + len(group.kv_heads)
    return "\nkey heads by window: " + listed(f"{counts[window]} with {window}" for window in sorted(counts))


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
    """Make the table of what decoding holds, however long the stream."""
    table = Table("memory", "dtype", box=None, pad_edge=False)
    table.add_column("MB", justify="right")
    weights = manifest.weights_dtype if manifest.quantization is None else manifest.quantization.weights
    table.add_row("weights", weights, megabytes(manifest.weights_bytes))
    latent = {cache.latent for cache in manifest.caches}
    rows = "latent rows" if latent == {True} else "keys, values, latent rows" if True in latent else "keys and values"
    for label, kind in (
        (f"sink {rows}", "sink"),
        (f"window {rows}", "window"),
        ("attention received", MASS_KIND),
        ("convolutions", "conv"),
        ("recurrent states", "recurrent"),
    ):
        states = [state for state in manifest.states if state.kind.startswith(kind)]
        if states:
            dtypes = listed(sorted({state.dtype for state in states}))
            table.add_row(label, dtypes, megabytes(sum(state.nbytes for state in states)))
    table.add_row("all, forever", "", megabytes(manifest.weights_bytes + manifest.state_bytes))
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
    """Describe what is wrong with a file's size; `run` and `verify` compare hashes as well."""
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    return "" if size == facts.bytes else f"has {size:,} bytes"
