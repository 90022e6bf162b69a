"""``sinkexport export``: a Hugging Face model to a bundle."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import click
from sinkrt.contract.constants import WINDOW_KINDS
from sinkrt.errors import printable

from sinkexport.auto_target import auto_target
from sinkexport.commands.options import RenamedOption, file_option, number_option
from sinkexport.config import (
    DEFAULT_NUM_SINK_TOKENS,
    DEFAULT_WINDOW_SIZE,
    WEIGHT_DTYPES,
    ExportConfig,
)
from sinkexport.targets import AUTO, CPU, ONNX, OPTIONS, TENSORRT_PLUGIN
from sinkexport.util.console import geometry
from sinkexport.util.garbage import no_garbage_collection
from sinkexport.util.progress import shown_progress

if TYPE_CHECKING:
    from sinkexport.quant.ranges import Ranges
    from sinkexport.quant.recipe import Recipe
    from sinkexport.variants.affine import AffineFile
    from sinkexport.variants.head_windows import HeadWindowFile
    from sinkexport.variants.sink_tuning import SinkTuningFile

STAGES = {
    "load": "Loading the model",
    "probe": "Reading its attention",
    "decode": "Building the decode graph",
    "write": "Writing weights",
    "prefill": "Building the prefill graph",
    "drafts": "Building the graph for drafts",
    "weights": "Comparing weights with the file",
    "hash": "Hashing files",
    "check": "Comparing the graphs with the model",
    "done": "Done",
}


@click.command(name="export")
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the new bundle.")
@number_option("--sink-tokens", DEFAULT_NUM_SINK_TOKENS, "First tokens that are kept forever.", metavar="S")
@number_option("--window", DEFAULT_WINDOW_SIZE, "Most recent tokens that are kept.", metavar="W")
@number_option("--batch", ExportConfig.batch, "Streams decoded together.", metavar="B")
@click.option(
    "--chunk",
    type=int,
    metavar="N",
    help=f"Tokens that prefill takes at once; 1: no prefill graph.  [default: {CPU.chunk_size} with target cpu, "
    f"{TENSORRT_PLUGIN.chunk_size} with tensorrt and its plugins, else {ONNX.chunk_size}; at most W]",
)
@click.option(
    "--pin-system",
    metavar="TEXT",
    help="Raise S until the sinks cover this system message, so that no chat forgets it.",
)
@click.option(
    "--sink-token",
    metavar="TOKEN|auto",
    help="Begin every text with this token, for a model that was trained with one for the sink, and "
    "S = 1 does. auto: its special token with 'sink' in its name.",
)
@click.option(
    "--dtype",
    type=click.Choice(sorted(WEIGHT_DTYPES)),
    default=ExportConfig.dtype,
    show_default=True,
    help="Type of weights, arithmetic and cache.",
)
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    help="Quantise as a recipe says: one of 'sinkexport inspect recipes', or a .yaml file.",
)
@file_option(
    "--calibration",
    "calibration_file",
    help="What 'sinkexport calibrate' wrote, for a recipe with static ranges or smoothing.",
)
@click.option(
    "--kv",
    type=click.Choice(WINDOW_KINDS),
    help="The window's keys and values; sinks stay in floating point.  [default: the recipe's, or fp]",
)
@file_option(
    "--head-windows",
    "head_windows_file",
    cls=RenamedOption,
    former="--budgets",
    help="Windows of single key heads, which 'sinkexport analyze' proposed; --window must be the longest.",
)
@file_option(
    "--sink-tuning",
    "sink_tuning_file",
    help="How attention to sinks is changed, as 'sinkexport tune' or 'analyze' wrote it.",
)
@file_option(
    "--affine",
    "affine_file",
    help="Scales and biases of attention weights, a safetensors file (docs/sink_tuning.md).",
)
@click.option(
    "--target",
    type=click.Choice((*OPTIONS, AUTO)),
    default=ExportConfig.target,
    show_default=True,
    help="onnx: standard operators, which run on any machine. cpu: kernels of this project's CPU library, which must "
    "be there to run the bundle ('sinkexport inspect cpu'). auto: cpu where the library runs here, else onnx; onnx "
    "with --dtype fp16. tensorrt: for 'sinkexport build', with its plugin (docs/tensorrt.md).",
)
@click.option(
    "--native", is_flag=True, help="With --target tensorrt: standard operators, for TensorRT >= 10.15 without plugin."
)
@click.option(
    "--speculate",
    type=int,
    metavar="K",
    help="Add a graph that verifies K drafted tokens at once, for 'run --speculate' (docs/speculation.md).",
)
@click.option("--no-check", is_flag=True, help="Do not compare the finished graphs and the weights with the model.")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there already.")
def command(
    model: str,
    output: Path,
    sink_tokens: int,
    window: int,
    batch: int,
    chunk: int | None,
    pin_system: str | None,
    sink_token: str | None,
    dtype: str,
    recipe: str | None,
    calibration_file: Path | None,
    kv: str | None,
    head_windows_file: Path | None,
    sink_tuning_file: Path | None,
    affine_file: Path | None,
    target: str,
    native: bool,
    speculate: int | None,
    no_check: bool,
    overwrite: bool,
) -> None:
    """Export MODEL (a local directory, a .gguf file or a Hub id) to a bundle."""
    # Bad numbers are refused before torch is loaded.
    config = ExportConfig(
        num_sink_tokens=sink_tokens,
        window_size=window,
        batch=batch,
        dtype=dtype,
        chunk_size=chunk,
        pin_system=pin_system,
        target=target,
        recipe=_loaded(recipe),
        calibration=_ranges(calibration_file),
        kv=kv,
        native=native,
        sink_token=sink_token,
        sink_tuning=_sink_tuning(sink_tuning_file),
        budgets=_head_windows(head_windows_file),
        affine=_affine(affine_file),
        speculate=speculate,
    )
    with no_garbage_collection(is_lasting=True):
        from sinkexport.pipeline.check_export import UncheckedWarning
        from sinkexport.pipeline.export import export
        from sinkexport.pipeline.stored_weights import STORED

    start = time.perf_counter()
    with shown_progress(STAGES) as show, warnings.catch_warnings(record=True) as caught:
        manifest = export(model, output, config, overwrite=overwrite, check=not no_check, report=show)
    for one in caught:
        if issubclass(one.category, UncheckedWarning):
            click.echo(f"sinkexport: warning: {one.message}", err=True)
    facts, stream = manifest.model, manifest.stream
    kept = geometry(stream.num_sink_tokens, stream.window_size, has_attention=bool(manifest.caches))
    named = printable(f"{output}: {facts.name}")
    click.echo(
        f"{named} ({facts.num_parameters / 1e6:.0f}M parameters, {facts.num_layers} layers), "
        f"{kept} B={batch} T={stream.chunk_size} {dtype}"
        f"{'' if config.recipe is None else ' ' + config.recipe.name}{' INT8 window' * config.has_int8_window}"
        f"{' tuned sinks' * (config.sink_tuning is not None)}{' head windows' * (config.budgets is not None)}"
        f"{' affine attention' * (config.affine is not None)}, "
        f"{sum(f.bytes for f in manifest.files.values()) / 1e6:.0f} MB + {manifest.state_bytes / 1e6:.1f} MB state, "
        f"{time.perf_counter() - start:.1f} s"
    )
    if target == AUTO:
        click.echo(f"target {config.target}: {auto_target(dtype).reason}")
    if (words := manifest.producer.get(STORED)) is not None:
        click.echo(f"{STORED}: {words}")


def _loaded(recipe: str | None) -> Recipe | None:
    if recipe is None:
        return None
    from sinkexport.quant.recipe import load_recipe

    return load_recipe(recipe)


def _head_windows(file: Path | None) -> HeadWindowFile | None:
    if file is None:
        return None
    from sinkexport.variants.head_windows import HeadWindowFile

    return HeadWindowFile.load(file)


def _sink_tuning(file: Path | None) -> SinkTuningFile | None:
    if file is None:
        return None
    from sinkexport.variants.sink_tuning import SinkTuningFile

    return SinkTuningFile.load(file)


def _affine(file: Path | None) -> AffineFile | None:
    if file is None:
        return None
    from sinkexport.variants.affine import AffineFile

    return AffineFile.load(file)


def _ranges(file: Path | None) -> Ranges | None:
    if file is None:
        return None
    from sinkexport.calibration.file import load_calibration, rounded_path

    return load_calibration(file).with_rounded_file(rounded_path(file))
