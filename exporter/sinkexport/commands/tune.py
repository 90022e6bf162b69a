"""``sinkexport tune``: factors on the attention to the first token, found on examples."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sinkexport.analysis.defaults import OBJECTIVES, UNITS
from sinkexport.commands.options import file_option, output_option, threads_option
from sinkexport.util.files import check_writable, read_text, write_whole
from sinkexport.util.progress import shown_progress

if TYPE_CHECKING:
    from sinkexport.analysis.tune import Score, TuneResult

STAGES = {"load": "Loading the model", "profile": "Profiling heads", "search": "Searching factors"}


@click.command(name="tune")
@click.argument("model")
@file_option(
    "--labelled",
    "labelled_file",
    required=True,
    help='JSONL: lines {"prompt": .., "choices": [..], "answer": ..}, or lines {"text": ..} to predict.',
)
@output_option("Where to write the factors, JSON.")
@click.option(
    "--by",
    type=click.Choice(UNITS),
    default=UNITS[0],
    show_default=True,
    help="What is tried by itself at first. By layer takes a run for each layer, by head one for each head.",
)
@click.option(
    "--objective",
    type=click.Choice(OBJECTIVES),
    default=OBJECTIVES[0],
    show_default=True,
    help="labels: right answers, or a text's tokens. entropy: the model's own certainty.",
)
@threads_option
def command(model: str, labelled_file: Path, output: Path, by: str, objective: str, threads: int | None) -> None:
    """Find factors on MODEL's attention to the first token with which it answers better, without training.

    After ZeroTuning (arXiv:2505.11739). MODEL is a local directory, a .gguf file or a Hub id. Every other line of the
    file is held out and shows what the factors are worth. 'sinkexport export --sink-tuning FILE' uses the result;
    docs/sink_tuning.md says what it does.
    """
    check_writable(output, "--output")
    lines = read_text(labelled_file, "--labelled")
    from sinkexport.analysis.tune import read_examples, tune
    from sinkexport.bench.machine import torch_threads
    from sinkexport.sources import load_model

    start = time.perf_counter()
    with shown_progress(STAGES) as show, torch_threads(threads):
        show("load", 0, 1)
        loaded = load_model(model)
        examples = read_examples(loaded.text_tokenizer(), lines)
        result = tune(loaded, examples, unit=by, objective=objective, report=show)
    write_whole(output, result.file.to_json(), "--output")
    factors = [factor for layer in result.file.first_token_scale for factor in layer]
    changed = sum(factor != 1 for factor in factors)
    click.echo(f"{result.num_examples} {result.kind} chose: {_shown(result, result.before, result.after)}")
    click.echo(f"{result.num_held_out} held out: {_shown(result, result.held_out_before, result.held_out_after)}")
    click.echo(
        f"{output}: {changed} of {len(factors)} heads changed, {time.perf_counter() - start:.1f} s"
        + ("" if changed else "; no factors are better than none")
    )


def _shown(result: TuneResult, before: Score, after: Score) -> str:
    name = "entropy" if result.objective == "entropy" else "loss"
    loss = f"{name} {before.loss:.4f} -> {after.loss:.4f} nats"
    if result.kind == "texts" or result.objective == "entropy":
        return loss
    return f"{1 - before.errors:.1%} -> {1 - after.errors:.1%} right, {loss}"
