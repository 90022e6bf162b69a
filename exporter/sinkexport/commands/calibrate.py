"""``sinkexport calibrate``: ranges of a model's activations, and weights rounded for them, found by streaming text."""

from __future__ import annotations

import time
from pathlib import Path

import click
from sinkrt.errors import printable

from sinkexport.commands.options import output_option, text_option, threads_option
from sinkexport.util.files import check_writable, read_text, write_whole
from sinkexport.util.progress import Report, shown_progress

STAGES = {
    "load": "Loading the model",
    "channels": "Streaming text: channels",
    "ranges": "Streaming text: ranges",
    "moments": "Streaming text: moments",
    "round": "Rounding weights",
}


@click.command(name="calibrate")
@click.argument("model")
@click.option(
    "--recipe",
    "recipe_name",
    required=True,
    metavar="NAME|FILE",
    help="What to find, and how: a recipe with 'calibration'.",
)
@text_option()
@output_option(
    "Where to write the result, JSON, and beside it weights that the recipe rounds for their inputs, as .safetensors. "
    "FILE.partial holds what was seen so far."
)
@threads_option
def command(model: str, recipe_name: str, text_file: Path, output: Path, threads: int | None) -> None:
    """Find what a recipe needs to know of MODEL (a local directory, a .gguf file or a Hub id): ranges, or how to round.

    Pieces of the text are streamed through sinks and window, past the window, as a bundle will stream. Tokens 0 .. S-1
    are counted apart. A run that was cut short, by kill -9 too, goes on where it stopped when it is started again, to
    the very same result. 'sinkexport inspect FILE' shows it, 'sinkexport export --calibration FILE' uses it.
    """
    from sinkexport.quant.recipe import load_recipe

    recipe = load_recipe(recipe_name)
    check_writable(output, "--output")
    text = read_text(text_file, "--text")
    from sinkexport.bench.machine import torch_threads
    from sinkexport.calibration.calibrate import calibrate
    from sinkexport.calibration.file import rounded_path
    from sinkexport.calibration.rounding import SCALES
    from sinkexport.sources import load_model

    partial = output.with_name(output.name + ".partial")
    with shown_progress(STAGES) as show, torch_threads(threads):
        show("load", 0, 1)
        loaded = load_model(model)
        start = time.perf_counter()
        streamed = _Streamed(show)
        found, rounded = calibrate(loaded, recipe, text, partial=partial, report=streamed)
        seconds = time.perf_counter() - start
    if rounded:  # before the file that has their hash
        import safetensors.numpy

        write_whole(rounded_path(output), safetensors.numpy.save(rounded), "--output")
    write_whole(output, found.to_json(), "--output")
    partial.unlink(missing_ok=True)
    what = []
    if found.inputs:
        apart = sum(facts.sinks is not None and facts.sinks.range > facts.rest.range for facts in found.inputs)
        what.append(f"{len(found.inputs)} inputs, in {apart} of them sinks reach beyond the rest")
    if rounded:
        layers = sum(name.endswith(SCALES) for name in rounded)
        what.append(f"weights of {layers} layers rounded, in {rounded_path(output).name}")
    named = printable(f"{output}: {found.model.name}")
    click.echo(
        f"{named} for recipe '{found.recipe}': {'; '.join(what)}; {found.text.streamed:,} tokens, "
        f"{seconds:.1f} s, {streamed.num_tokens / max(seconds, 1e-9):.0f} tokens/s"
    )


class _Streamed:
    """Passes a report on, and counts the tokens streamed in this run, over all passes."""

    def __init__(self, show: Report) -> None:
        self._show = show
        self._stage = ""
        self._before = 0
        self.num_tokens = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == self._stage and stage != "round":
            self.num_tokens += done - self._before
        self._stage, self._before = stage, done
        self._show(stage, done, total)
