"""The picture of a `SinkReport`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from sinkexport.analyze import SinkReport


def draw(report: SinkReport) -> Figure:
    """Three panels: attention on the first tokens, the same by layer and head, secondary sinks by layer."""
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    by_position, by_head, later = figure.subplots(1, 3)
    shown = max(1, report.recommended)
    figure.suptitle(f"{report.model}: keep {report.recommended} ({report.num_windows} windows of "
                    f"{report.window_tokens} tokens)", fontsize=11)  # fmt: skip

    by_position.bar(range(report.num_candidates), report.mass_by_position)
    by_position.axhline(report.base, color="black", linewidth=1, label="any other token")
    by_position.set_yscale("log")
    by_position.set_xlabel("token")
    by_position.set_ylabel("mean attention from afar")
    by_position.legend(fontsize=8)

    mass = np.array(report.mass)[:, :, :shown].sum(axis=-1)  # [layers, heads]
    image = by_head.imshow(mass, aspect="auto", vmin=0, vmax=1, interpolation="nearest")
    by_head.set_xlabel("head")
    by_head.set_ylabel("layer")
    by_head.set_title(f"attention on the first {shown}", fontsize=10)
    figure.colorbar(image, ax=by_head)

    points = [(sink.positions[0], layer, sink.weight) for sink in report.secondary for layer in sink.layers]
    if points:
        positions, layers, weights = zip(*points, strict=True)
        marks = later.scatter(positions, layers, c=weights, s=14, vmin=0)
        figure.colorbar(marks, ax=later, label="largest mean attention from afar")
    later.set_xlim(0, report.window_tokens)
    later.set_ylim(-0.5, len(report.mass) - 0.5)
    later.set_xlabel("position in the window")
    later.set_ylabel("layer")
    later.set_title("secondary sinks", fontsize=10)
    return figure
