"""``sinkexport bench``: speed and memory of a bundle on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from sinkexport.bench.report import TURN, BenchConfig
from sinkexport.commands.options import (
    backend_option,
    bundle_argument,
    json_option,
    number_option,
    random_ids_option,
    refuse_given,
    speculate_option,
    threads_option,
)
from sinkexport.util.console import geometry, table_console
from sinkexport.util.files import check_writable, write_whole
from sinkexport.util.process_memory import MIB
from sinkexport.util.progress import shown_progress

if TYPE_CHECKING:
    from sinkexport.bench.report import BenchReport

STAGES = {
    "load": "Loading the bundle",
    "prefill": "Prefilling a prompt",
    "feed": "Feeding the stream",
    "decode": "Timing steps",
}
Figures = Mapping[str, Any]


@click.command(name="bench")
@bundle_argument
@number_option("--steps", BenchConfig.steps, "Timed steps at each position.")
@number_option("--warmup", BenchConfig.warmup, f"Untimed steps before each turn of {TURN} timed ones.")
@click.option(
    "--position",
    "positions",
    type=int,
    multiple=True,
    default=BenchConfig.positions,
    show_default=True,
    metavar="P",
    help="Measure with so many tokens in the stream; repeatable.",
)
@number_option("--prompt-tokens", BenchConfig.prompt_tokens, "Length of the prompt whose prefill is timed.")
@speculate_option(
    "Measure guessed tokens instead: answers of --steps tokens to texts that repeat themselves and to others, beside "
    "plain steps. As of 'sinkexport run'."
)
@threads_option
@backend_option
@random_ids_option
@json_option("Write every figure as JSON too.")
@click.pass_context
def command(
    ctx: click.Context,
    bundle: Path,
    steps: int,
    warmup: int,
    positions: tuple[int, ...],
    prompt_tokens: int,
    speculate: str | None,
    threads: int | None,
    backend: str,
    seed: int,
    json_file: Path | None,
) -> None:
    """Measure how fast the bundle DIR decodes and prefills, and whether its memory grows.

    Positions take turns, so that all of them meet the machine's slow moments; the memory's own bandwidth is measured
    in between. Positions far into a stream must be reached first: 50,000 tokens take minutes.
    """
    from sinkexport.bench.run import run_bench

    config = BenchConfig(
        steps=steps,
        warmup=warmup,
        positions=positions,
        prompt_tokens=prompt_tokens,
        threads=threads,
        backend=backend,
        seed=seed,
    )
    if json_file is not None:
        check_writable(json_file, "--json")
    if speculate is not None:
        _measure_speculation(ctx, bundle, speculate, config, json_file)
        return
    with shown_progress(STAGES) as show:
        report = run_bench(bundle, config, show)
    if json_file is not None:
        write_whole(json_file, report.to_json(), "--json")
    _print_report(report)


def _measure_speculation(
    ctx: click.Context, bundle: Path, speculate: str, config: BenchConfig, json_file: Path | None
) -> None:
    from sinkexport.bench.speculation import run_speculation

    others = {"received": "with --speculate", "expected": "--steps and --threads alone", "fix": "leave it out"}
    refuse_given(ctx, ("warmup", "prompt_tokens", "seed"), **others)
    with shown_progress(STAGES) as show:
        report = run_speculation(
            bundle, speculate, tokens=config.steps, threads=config.threads, backend=config.backend, report=show
        )
    if json_file is not None:
        write_whole(json_file, report.to_json(), "--json")
    table = Table("greedy answer", box=None, pad_edge=False)
    for header in ("tokens a step", "accepted", "ms/token", "plain", "times as fast", "same as plain"):
        table.add_column(header, justify="right")
    for text in report.texts:
        table.add_row(
            text.name,
            f"{text.tally.tokens_per_step:.2f}",
            f"{text.tally.acceptance:.0%}",
            f"{median(text.speculated_ms):.2f}",
            f"{median(text.plain_ms):.2f}",
            f"{text.speedup:.2f}",
            "yes" if text.parted_at is None else f"to token {text.parted_at}",
        )
    console = table_console()
    console.print(table)
    tasks, free = (report.mean_speedup(of_tasks=each) for each in (True, False))
    verdict = "it pays" if min(tasks, free) >= 1 else "it pays where text repeats" if tasks > 1 else "it does not pay"
    console.print(f"{tasks:.2f} times as fast on texts that repeat, {free:.2f} on others: {verdict}")


def _print_report(report: BenchReport) -> None:
    figures = report.to_dict()
    prefill, memory = figures["prefill"], figures["memory"]
    console = table_console()
    for line in _facts(figures):
        console.print(line, markup=False, soft_wrap=True)
    console.print(_positions(figures))
    console.print(
        f"prefill of {prefill['prompt_tokens']:,} tokens: {prefill['median_ms']:,.0f} ms, "
        f"{prefill['tokens_per_s']:.1f} tokens/s"
    )
    if memory is not None:
        start, growth = memory["rss_start_bytes"] / MIB, memory["rss_growth_bytes"] / MIB
        highest = memory["rss_highest_growth_bytes"] / MIB
        console.print(
            f"memory: {start:,.0f} MiB resident at the start, {growth:+.1f} MiB over the run ({highest:+.1f} at most)"
        )


def _facts(figures: Figures) -> Iterator[str]:
    """Yield lines about the bundle, the machine, and the bytes of a step."""
    facts, machine, size = figures["bundle"], figures["environment"], figures["bytes_per_step"]
    bandwidth = figures["bandwidth_gb_per_s"]
    kept = geometry(facts["num_sink_tokens"], facts["window_size"], has_attention=facts["has_attention"])
    yield f"{facts['model']}: {facts['weights_dtype']}, {kept} B={facts['batch']} T={facts['chunk_size']}"
    yield (
        f"{machine['cpu']}, {machine['threads']} threads, load average {machine['load_average_1min']:.2f} at the start"
    )
    yield (
        f"a step reads {size['weights'] / 1e6:.1f} MB of weights and {size['states'] / 1e6:.1f} MB of state; "
        f"memory reads {bandwidth['median']:.1f} GB/s ({bandwidth['min']:.1f} to {bandwidth['max']:.1f}), "
        f"so at least {figures['floor_ms']:.2f} ms"
    )
    if machine["not_recorded"] is not None:
        yield f"steps are no CUDA graphs: {machine['not_recorded']}"


def _positions(figures: Figures) -> Table:
    """Make the table of decode steps: a row for each position, and one for all of them."""
    table = Table("decode at", box=None, pad_edge=False)
    for header in ("steps", "ms median", "p99", "tokens/s", "GB/s", "of bandwidth", "x first", "quartiles"):
        table.add_column(header, justify="right")
    rows = [(f"{each['position']:,}", each, each["ratio_to_first"]) for each in figures["positions"]]
    rows[0] = (*rows[0][:2], None)
    for name, each, ratio in [*rows, ("all", figures["decode"], None)] if len(rows) > 1 else rows:
        table.add_row(
            name,
            f"{each['samples']:,}",
            f"{each['median_ms']:.2f}",
            f"{each['p99_ms']:.2f}",
            f"{each['tokens_per_s']:.1f}",
            f"{each['gb_per_s']:.1f}",
            f"{each['bandwidth_share']:.0%}",
            "" if ratio is None else f"{ratio['median']:.3f}",
            "" if ratio is None else f"{ratio['low_quartile']:.3f} .. {ratio['high_quartile']:.3f}",
        )
    return table
