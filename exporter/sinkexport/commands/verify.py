"""``sinkexport verify``: parity of a bundle with its Hugging Face model; its quality if it is quantised."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table
from sinkrt.contract import MANIFEST_NAME, load_manifest
from sinkrt.errors import UsageError, problem

from sinkexport.commands.options import (
    MODEL_SOURCES,
    backend_option,
    bundle_argument,
    json_option,
    number_option,
    random_ids_option,
    refuse_given,
    text_option,
)
from sinkexport.evaluation.defaults import (
    DEFAULT_TOLERANCE,
    QUALITY_TOKENS,
    TOLERANCE_PER_TOKEN,
    VERIFY_DENSE_TOKENS,
    VERIFY_WRAPS,
)
from sinkexport.util.console import table_console
from sinkexport.util.files import check_writable, read_text, write_whole
from sinkexport.util.garbage import no_garbage_collection
from sinkexport.util.progress import shown_progress

if TYPE_CHECKING:
    from sinkexport.evaluation.parity import ParityReport
    from sinkexport.evaluation.quality_gate import QualityReport

STAGES = {
    "load": "Loading bundle and model",
    "dense": "Running the dense model",
    "stream": "Streaming both",
    "quality": "Predicting the text with both",
    "prefill": "Prefilling in pieces",
}
AGAINST = {
    "dense": "transformers, before eviction",
    "re-rotating": "keys re-rotated every step",
    "call-following": "the model on its cached tokens",
    "prefill": "the bundle, token by token",
}
LOGITS_ONLY, QUALITY_ONLY = ("wraps", "dense_tokens", "seed"), ("tokens",)
"""Options that only one of the two kinds of comparison has."""

FIGURES = {
    "perplexity_increase": ("perplexity increase", ".2%"),
    "kl_divergence": ("KL divergence, mean nats a token", ".5f"),
    "top1_agreement": ("top-1 agreement", ".2%"),
}
"""Label and format of each figure that may have a threshold."""


@click.command(name="verify")
@bundle_argument
@click.option(
    "--against",
    required=True,
    metavar="MODEL",
    help=f"The model that was exported: {MODEL_SOURCES}. For a quantised DIR also a bundle of it in floating point "
    "with the same S and W, which needs no torch.",
)
@text_option(
    "Text to stream, repeated if too short; a quantised DIR needs one, which is not repeated.  [default: random ids]",
    required=False,
)
@click.option(
    "--quality", is_flag=True, help="Compare predictions of a text, as for a quantised DIR, though it is not quantised."
)
@number_option(
    "--tokens",
    QUALITY_TOKENS,
    "Quantised or --quality: tokens of the text, or all if it has fewer.",
    type=click.IntRange(min=2),
)
@number_option(
    "--wraps", VERIFY_WRAPS, "How often the window is overwritten after it has filled.", type=click.IntRange(min=1)
)
@number_option(
    "--dense-tokens",
    VERIFY_DENSE_TOKENS,
    "Positions compared with the dense model, at most the cache's capacity.",
    type=click.IntRange(min=1),
)
@click.option(
    "--tolerance",
    type=float,
    metavar="X",
    help="Largest error of a logit as a share of the logits' spread.  "
    f"[default: {DEFAULT_TOLERANCE['float32']:g} (fp32) or {DEFAULT_TOLERANCE['float16']:g} (fp16), at least "
    f"{TOLERANCE_PER_TOKEN:g} times S + W; quantised: of prefill only]",
)
@random_ids_option
@backend_option
@json_option()
@click.pass_context
def command(
    ctx: click.Context,
    bundle: Path,
    against: str,
    text_file: Path | None,
    quality: bool,
    tokens: int,
    wraps: int,
    dense_tokens: int,
    tolerance: float | None,
    seed: int,
    backend: str,
    json_file: Path | None,
) -> None:
    """Check that the bundle DIR computes what its model computes.

    Logits are compared with transformers' dense forward pass before the window fills, with a reference that
    re-rotates every key in every step over several wraps of the window, and between prefill and single steps.
    A model that this reference cannot follow is run on its cached tokens for every step instead.
    Exit code 1 if any error is above the tolerance.

    A quantised DIR cannot have the same logits. Its predictions of a text are compared with those in floating point:
    Kullback-Leibler divergence, equal top-1 tokens, and perplexity, each against the threshold that its recipe has
    set; and prefill with single steps. Exit code 1 if one does not hold.
    """
    quantization = load_manifest(bundle).quantization
    by_quality = quality or quantization is not None
    kind = "--quality" if quality else "logits compared"
    if quantization is not None:
        kind = f"a bundle quantised by '{quantization.recipe}'"
    _check_together(ctx, by_quality, kind, text_file, against)
    text = None if text_file is None else read_text(text_file, "--text")
    if json_file is not None:
        check_writable(json_file, "--json")
    report: ParityReport | QualityReport
    remarks: tuple[str, ...] = ()
    with shown_progress(STAGES) as show:
        if by_quality:
            from sinkexport.evaluation.quality_gate import verify_quality

            report = verify_quality(
                bundle, against, text or "", num_tokens=tokens, tolerance=tolerance, backend=backend, report=show
            )
            headline, table = _quality_table(report)
        else:
            with no_garbage_collection(is_lasting=True):
                from sinkexport.evaluation.parity import verify

            report = verify(
                bundle,
                against,
                text=text,
                wraps=wraps,
                tolerance=tolerance,
                dense_tokens=dense_tokens,
                seed=seed,
                backend=backend,
                report=show,
            )
            headline, table = _parity_table(report)
            remarks = report.remarks
    if json_file is not None:
        write_whole(json_file, report.to_json(), "--json")
    console = table_console()
    console.print(headline, markup=False, soft_wrap=True)
    console.print(table)
    for remark in remarks:
        click.echo(remark)
    for failure in report.failures:
        click.echo(f"FAILED {failure}", err=True)
    if not report.passed:
        raise SystemExit(1)
    click.echo("passed")


def _check_together(ctx: click.Context, by_quality: bool, kind: str, text_file: Path | None, against: str) -> None:
    """Check options that one kind of comparison needs, or does not have. kind: in words.

    Raises: UsageError.
    """
    refused, fix = (LOGITS_ONLY, "leave it out") if by_quality else (QUALITY_ONLY, "add --quality")
    refuse_given(ctx, refused, received=f"with {kind}", expected="no such option", fix=fix)
    if by_quality and text_file is None:
        raise UsageError(
            problem("--text", received=f"none, with {kind}", expected="a text to predict", fix="pass --text FILE")
        )
    if not by_quality and (Path(against) / MANIFEST_NAME).is_file():
        raise UsageError(
            problem(
                "--against",
                received=f"'{against}', a bundle",
                expected="the model that was exported",
                fix="or add --quality and --text to compare two bundles",
            )
        )


def _quality_table(report: QualityReport) -> tuple[str, Table]:
    """Make a line about both sides, and the table of figures."""
    quality = report.quality
    headline = (
        f"{report.bundle} ({report.recipe or report.weights_dtype}) against {report.reference}: "
        f"S={report.num_sink_tokens} W={report.window_size}; {quality.num_tokens:,} tokens predicted"
    )
    table = Table("figure", box=None, pad_edge=False)
    for header in ("value", "limit", ""):
        table.add_column(header, justify="right")
    limits = {check.name: check for check in report.checks}
    table.add_row("perplexity in floating point", f"{quality.reference_perplexity:.3f}")
    table.add_row("perplexity", f"{quality.perplexity:.3f}")
    for name, (label, form) in FIGURES.items():
        value, check = f"{getattr(quality, name):{form}}", limits.get(name)
        if name == "perplexity_increase" and quality.standard_error is not None:
            value += f" +- {quality.standard_error:{form}}"
        state = "" if check is None else "ok" if check.passed else "FAILED"
        table.add_row(label, value, "" if check is None else f"{check.limit:{form}}", state)
    table.add_row("KL divergence, worst", f"{quality.worst_kl_divergence:.3f}", "", f"token {quality.worst_token:,}")
    prefill = report.prefill
    table.add_row(
        f"prefill, error of spread, {prefill.positions} positions",
        f"{prefill.max_relative_error:.2e}",
        f"{report.prefill_tolerance:.2e}",
        "ok" if prefill.failed_position is None else "FAILED",
    )
    return headline, table


def _parity_table(report: ParityReport) -> tuple[str, Table]:
    """Make a line about both sides, and the table of comparisons."""
    table = Table("comparison", "against", box=None, pad_edge=False)
    for header in ("positions", "max error", "of spread", "worst at", "top-1 agreement", ""):
        table.add_column(header, justify="right")
    for c in report.comparisons:
        table.add_row(
            c.name,
            AGAINST[c.reference or c.name],
            f"{c.positions:,}",
            f"{c.max_error:.2e}",
            f"{c.max_relative_error:.2e}",
            f"{c.worst_position:,}",
            f"{c.top1_agreement:.2%}",
            "ok" if c.failed_position is None else "FAILED",
        )
    headline = (
        f"{report.bundle} against {report.model}: S={report.num_sink_tokens} W={report.window_size} B={report.batch} "
        f"{report.weights_dtype}; {report.wraps} wraps, {report.num_tokens:,} tokens ({report.ids}); "
        f"tolerance {report.tolerance:.1e} of the logits' spread"
    )
    return headline, table
