"""Plot of a `SinkReport`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sinkexport.analysis.sinks import SinkReport


def draw(report: SinkReport) -> Figure:
    """Draw attention on the first tokens, the same by layer and head, and secondary sinks by layer and place."""
    figure = Figure(figsize=(15, 4.8), dpi=120, layout="constrained")
    by_position, by_head, later = figure.subplots(1, 3)
    title = (
        f"{report.model}: keep {report.recommended} ({report.num_windows} windows of {report.window_tokens:,} tokens)"
    )
    figure.suptitle(title, fontsize=11, parse_math=False)  # a name may hold a dollar sign
    _draw_positions(by_position, report)
    _draw_heads(by_head, report)
    _draw_secondary(later, report)
    return figure


def _draw_positions(axes: Axes, report: SinkReport) -> None:
    axes.bar(range(report.num_candidates), report.mass_by_position)
    axes.axhline(report.base, color="black", linewidth=1, label="any other token")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("token")
    axes.set_ylabel("mean attention from afar")
    axes.set_title("first tokens", fontsize=10)
    axes.legend(fontsize=8)


def _draw_heads(axes: Axes, report: SinkReport) -> None:
    shown = max(1, report.recommended)
    image = axes.imshow(report.mass_of_first(shown), aspect="auto", vmin=0, vmax=1, interpolation="nearest")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title(
        "attention on the first token" if shown == 1 else f"attention on the first {shown} tokens", fontsize=10
    )
    axes.figure.colorbar(image, ax=axes)


def _draw_secondary(axes: Axes, report: SinkReport) -> None:
    """Draw a dot for each layer of each sighting in the report; bright ones resemble the first token."""
    points = [
        (seen.position, layer, 200 * seen.weight, seen.likeness)
        for sink in report.secondary
        for seen in sink.sightings
        for layer in seen.layers
    ]
    if points:
        positions, layers, areas, likeness = zip(*points, strict=True)
        marks = axes.scatter(positions, layers, s=areas, c=likeness, vmin=0, vmax=1, alpha=0.8)
        axes.figure.colorbar(marks, ax=axes, label="likeness of the first token's value")
    axes.set_xlim(0, report.window_tokens)
    axes.set_ylim(len(report.mass) - 0.5, -0.5)  # as in the panel beside it
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("position in the window")
    axes.set_ylabel("layer")
    axes.set_title("later tokens looked at from afar (area: weight)", fontsize=10)
