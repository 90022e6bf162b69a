"""``sinkexport eval``: perplexity of a bundle over a long text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table
from sinkrt.errors import UsageError, problem

from sinkexport.commands.options import (
    MODEL_SOURCES,
    backend_option,
    bundle_argument,
    json_option,
    number_option,
    plot_option,
    refuse_given,
    refuse_same_file,
    text_option,
    threads_option,
)
from sinkexport.evaluation.defaults import EVAL_DENSE_TOKENS, EVAL_SEGMENT_TOKENS, EVAL_TOKENS
from sinkexport.util.console import table_console
from sinkexport.util.files import check_writable, read_text, write_whole
from sinkexport.util.plot import png
from sinkexport.util.progress import shown_progress

if TYPE_CHECKING:
    from sinkexport.evaluation.evaluate import EvalReport

STAGES = {
    "load": "Loading",
    "bundle": "Bundle, token by token",
    "sinks + window": "Sinks + window in torch",
    "window only": "Window only",
    "recompute": "Sliding window, recomputed",
    "dense": "Dense model",
}
DEFAULT_JSON, DEFAULT_PLOT = Path("eval.json"), Path("eval.png")


@click.command(name="eval")
@bundle_argument
@text_option("UTF-8 text, the longer the better.")
@number_option("--tokens", EVAL_TOKENS, "Tokens of the text to stream, or all if it has fewer.")
@number_option("--segment", EVAL_SEGMENT_TOKENS, "Tokens of each point of the curves.")
@click.option(
    "--compare",
    is_flag=True,
    help="Predict the same tokens in torch with sinks + window, with a window only, with a sliding window "
    "that is recomputed, and with the dense model until its limit.",
)
@click.option(
    "--against",
    metavar="MODEL",
    help=f"With --compare: the model that was exported, {MODEL_SOURCES}.",
)
@number_option(
    "--dense-tokens",
    EVAL_DENSE_TOKENS,
    "With --compare: where the dense model stops, or at its own limit if that is less.",
)
@click.option(
    "--recompute-block",
    type=int,
    metavar="N",
    help="With --compare: tokens that each recomputation of the last S + W predicts. 1 is exact, and slow.  "
    "[default: (S + W) / 8]",
)
@backend_option
@threads_option
@json_option("Where to write all figures.", default=DEFAULT_JSON, show_default=True)
@plot_option("Where to write the curves as a PNG image.", default=DEFAULT_PLOT, show_default=True)
@click.option("--no-plot", is_flag=True, help="Draw nothing: matplotlib is not needed then.")
@click.pass_context
def command(
    ctx: click.Context,
    bundle: Path,
    text_file: Path,
    tokens: int,
    segment: int,
    compare: bool,
    against: str | None,
    dense_tokens: int,
    recompute_block: int | None,
    backend: str,
    threads: int | None,
    json_file: Path,
    plot_file: Path,
    no_plot: bool,
) -> None:
    """Measure how well the bundle DIR predicts a long text, streamed token by token.

    Perplexity is exp of the mean negative log-likelihood of a token; lower is better. The table shows it for the whole
    text, with the standard error over segments, and for the tokens before and after the cache is full.
    """
    _check_compare(ctx, compare, against)
    text = read_text(text_file, "--text")
    check_writable(json_file, "--json")
    if not no_plot:
        check_writable(plot_file, "--plot")
        refuse_same_file({"--json": json_file, "--plot": plot_file})
        import matplotlib.figure  # noqa: F401 - if it is missing, that should not show after an hour
    from sinkexport.evaluation.evaluate import BaselineOptions, evaluate

    wanted = None if against is None else BaselineOptions(against, dense_tokens, recompute_block)
    with shown_progress(STAGES) as show:
        report = evaluate(
            bundle,
            text,
            num_tokens=tokens,
            segment_tokens=segment,
            compare=wanted,
            backend=backend,
            threads=threads,
            report=show,
        )
    write_whole(json_file, report.to_json(), "--json")
    if not no_plot:
        from sinkexport.evaluation.plot import draw

        write_whole(plot_file, png(draw(report)), "--plot")
    _print_report(report)
    click.echo(f"wrote {json_file}" + ("" if no_plot else f" and {plot_file}"), err=True)


def _check_compare(ctx: click.Context, compare: bool, against: str | None) -> None:
    """Refuse options of a comparison without one, and a comparison with nothing."""
    if compare:
        if against is None:
            raise UsageError(
                problem(
                    "--compare", received="no model", expected="--against MODEL", fix="name the model that was exported"
                )
            )
        return
    refuse_given(
        ctx,
        ("against", "dense_tokens", "recompute_block"),
        received="without --compare",
        expected="a comparison",
        fix="add --compare",
    )


def _print_report(report: EvalReport) -> None:
    table = Table("method", "what it is", box=None, pad_edge=False)
    for header in ("tokens", "perplexity", "+-", "before", "after", "tokens/s"):
        table.add_column(header, justify="right")
    for c in report.curves:
        table.add_row(
            c.name,
            c.note,
            f"{c.num_tokens:,}",
            *("-" if x is None else f"{x:.2f}" for x in (c.perplexity, c.standard_error)),
            *("-" if x is None else f"{x:.2f}" for x in (c.perplexity_before, c.perplexity_after)),
            f"{c.tokens_per_s:.1f}",
        )
    console = table_console()
    console.print(
        f"{report.model}: S={report.num_sink_tokens} W={report.window_size} {report.weights_dtype}; "
        f"{report.num_tokens:,} tokens in segments of {report.segment_tokens:,}; before and after: the cache is full",
        markup=False,
        soft_wrap=True,
    )
    console.print(table)
