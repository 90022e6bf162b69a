"""``sinkexport verify``: parity of a bundle with its Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from sinkexport.console import table_console
from sinkexport.files import check_writable, read_text, write_whole
from sinkexport.progress import shown_progress

if TYPE_CHECKING:
    from sinkexport.verify import VerifyReport

STAGES = {
    "load": "Loading bundle and model",
    "dense": "Running the dense model",
    "stream": "Streaming both",
    "prefill": "Prefilling in pieces",
}
AGAINST = {
    "dense": "transformers, before eviction",
    "streaming": "keys re-rotated every step",
    "prefill": "the bundle, token by token",
}


@click.command(name="verify")
@click.argument("bundle", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--against", required=True, metavar="MODEL",
              help="The model that was exported: a local directory, a .gguf file or a Hub id.")  # fmt: skip
@click.option("--text", "text_file", type=click.Path(path_type=Path), metavar="FILE",
              help="Text to stream, repeated if too short.  [default: random ids]")  # fmt: skip
@click.option("--wraps", type=click.IntRange(min=1), default=6, show_default=True, metavar="N",
              help="How often the window is overwritten after it has filled.")  # fmt: skip
@click.option("--dense-tokens", type=click.IntRange(min=1), default=256, show_default=True, metavar="N",
              help="Positions compared with the dense model, at most the cache's capacity.")  # fmt: skip
@click.option("--tolerance", type=float, metavar="X",
              help="Largest error of a logit as a share of the logits' spread.  "
                   "[default: 1e-3 (fp32) or 0.25 (fp16), at least 2e-6 times S + W]")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random ids.")
@click.option("--backend", type=click.Choice(["ort", "ort-cuda", "tensorrt"]), default="ort", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the report as JSON too.")  # fmt: skip
def command(
    bundle: Path,
    against: str,
    text_file: Path | None,
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
    Exit code 1 if any error is above the tolerance.
    """
    text = None if text_file is None else read_text(text_file, "--text")
    if json_file is not None:
        check_writable(json_file, "--json")
    from sinkexport.verify import verify

    with shown_progress(STAGES) as show:
        report = verify(
            bundle, against, text=text, wraps=wraps, tolerance=tolerance, dense_tokens=dense_tokens, seed=seed,
            backend=backend, report=show,
        )  # fmt: skip
    if json_file is not None:
        write_whole(json_file, report.to_json(), "--json")
    _print_report(report)
    if not report.passed:
        raise SystemExit(1)


def _print_report(report: VerifyReport) -> None:
    table = Table("comparison", "against", box=None, pad_edge=False)
    for header in ("positions", "max error", "of spread", "worst at", "top-1 equal", ""):
        table.add_column(header, justify="right")
    for c in report.comparisons:
        table.add_row(
            c.name,
            AGAINST[c.name],
            f"{c.positions:,}",
            f"{c.max_error:.2e}",
            f"{c.max_relative_error:.2e}",
            f"{c.worst_position:,}",
            f"{c.top1_agreement:.2%}",
            "ok" if c.failed_position is None else "FAILED",
        )
    console = table_console()
    console.print(
        f"{report.bundle} against {report.model}: S={report.num_sink_tokens} W={report.window_size} B={report.batch} "
        f"{report.weights_dtype}; {report.wraps} wraps, {report.num_tokens:,} tokens ({report.ids}); "
        f"tolerance {report.tolerance:.1e} of the logits' spread",
        markup=False,
        soft_wrap=True,
    )
    console.print(table)
    for failure in report.failures:
        click.echo(f"FAILED {failure}", err=True)
    if report.passed:
        click.echo("passed")
