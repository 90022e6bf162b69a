"""Plot of an evaluation: perplexity over the text, a line for each predictor."""

from __future__ import annotations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from sinkrt.errors import printable

from sinkexport.evaluation.evaluate import EvalReport
from sinkexport.evaluation.perplexity import Curve

COLORS = ("#0072b2", "#56b4e9", "#d55e00", "#009e73", "#555555", "#cc79a7")  # colour-blind people see them apart
DOTS_PER_INCH = 150


def draw(report: EvalReport) -> Figure:
    """Draw the perplexity of each segment at its middle, on a logarithmic axis, and a line where eviction begins."""
    figure = Figure(figsize=(9, 5), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, curve in enumerate(report.curves):
        # The bundle lies on top of the same thing in torch: a broad pale line shows beneath a narrow one.
        axes.plot(
            *_points(curve),
            label=_label(curve),
            color=COLORS[i % len(COLORS)],
            marker=".",
            markersize=5,
            linewidth=3.5 if i == 0 else 1.5,
            alpha=0.5 if i == 0 else 1.0,
        )
    if report.capacity < report.num_tokens:
        axes.axvline(
            report.capacity,
            color="black",
            linestyle="--",
            linewidth=1,
            label=f"cache full ({report.capacity:,} tokens)",
        )
    axes.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(0, report.num_tokens)
    axes.set_xlabel("token of the text")
    axes.set_ylabel(f"perplexity of {report.segment_tokens:,} tokens")
    title = f"{printable(report.model)}: {report.num_sink_tokens} sinks + window of {report.window_size:,}"
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _points(curve: Curve) -> tuple[list[float], list[float]]:
    middles = [segment.first_token + segment.num_tokens / 2 for segment in curve.segments]
    return middles, [segment.perplexity for segment in curve.segments]


def _label(curve: Curve) -> str:
    return f"{curve.name} ({curve.note}): {curve.perplexity:.1f}"
