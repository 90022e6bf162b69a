"""What `sinkexport analyze` proposes for the export: per-head windows, and heads whose later sinks are scaled down."""

from __future__ import annotations

import numpy as np
from sinkrt.errors import UsageError, problem

from sinkexport.analysis.sinks import SinkReport
from sinkexport.variants.head_windows import HeadWindowFile, WindowedModel
from sinkexport.variants.sink_tuning import ActPart, SinkTuningFile, TunedModel

USUAL = 0.5
"""Share of the windows that `analyze` measured in which a head must have a later sink to be calibrated."""


def propose_head_windows(
    report: SinkReport, architecture: str, *, longest: int, shortest: int, share: float
) -> tuple[HeadWindowFile, float]:
    """Give a window of `longest` tokens to the key heads that need it most, and `shortest` to the others.

    A head needs it if its output would change most with a window of `shortest` tokens (or the next smaller size that
    was measured). A key head changes as much as its query heads together. As many heads keep the long window as fit
    in.
    share: memory of the windows, as a share of what they would take if all were long.
    Returns: the file, and the largest change of a key head with a short window.

    Raises: UsageError as `check_proposal`, or if no such window was measured.
    """
    check_proposal(longest, shortest, share)
    measured = [i for i, distance in enumerate(report.distances) if distance <= shortest]
    if not measured:
        nearest = min(report.distances)
        raise UsageError(
            problem(
                "--short-window",
                received=shortest,
                fix="raise it, or --window-tokens",
                expected=f">= {nearest}, the shortest window that is measured",
            )
        )
    lost = np.array(report.change)[:, :, measured[-1]]  # [L, Hq]
    lost = np.sqrt(np.square(lost.reshape(len(lost), report.num_kv_heads, -1)).mean(axis=2))  # [L, Hkv]
    num_long = int((share * longest - shortest) / (longest - shortest) * lost.size + 1e-9)
    order = np.argsort(-lost.reshape(-1), kind="stable")
    windows = np.full(lost.size, shortest)
    windows[order[:num_long]] = longest
    largest = float(lost.reshape(-1)[order[num_long:]].max(initial=0.0))
    model = WindowedModel(
        name=report.model, architecture=architecture, num_layers=lost.shape[0], num_kv_heads=lost.shape[1]
    )
    found = (
        f"analyze, {report.num_windows} windows of {report.window_tokens} tokens: {num_long} of {lost.size} key "
        f"heads long; the output of no other changes by more than {largest:.1%}"
    )
    shaped = tuple(tuple(int(w) for w in layer) for layer in windows.reshape(lost.shape))
    return HeadWindowFile(model=model, found=found, windows=shaped), largest


def check_proposal(longest: int, shortest: int, share: float) -> None:
    """Check what is asked for, before a model is loaded.

    Raises: UsageError unless 1 <= shortest < longest, and `shortest` tokens in all heads fit into the share.
    """
    if longest < 2:
        raise UsageError(problem("--long-window", received=longest, expected=">= 2", fix="raise it"))
    if not 1 <= shortest < longest:
        raise UsageError(
            problem(
                "--short-window",
                received=shortest,
                fix="change one of them",
                expected=f"1 .. {longest - 1}, below --long-window",
            )
        )
    if not shortest / longest <= share <= 1:
        least = f"{shortest / longest:.3g} .. 1 for {shortest} of {longest} tokens"
        raise UsageError(
            problem("--head-window-share", received=share, expected=least, fix="change it, or lower --short-window")
        )


def propose_sink_tuning(report: SinkReport, architecture: str) -> SinkTuningFile:
    """Calibrate the heads that have later sinks in `USUAL` of the windows or more, and leave the first token alone."""
    heads = tuple(tuple(share >= USUAL for share in layer) for layer in report.later_sinks)
    num_heads = len(heads[0])
    return SinkTuningFile(
        model=TunedModel(name=report.model, architecture=architecture, num_layers=len(heads), num_q_heads=num_heads),
        found=f"analyze, {report.num_windows} windows of {report.window_tokens} tokens: later sinks in "
        f"{sum(map(sum, heads))} of {len(heads) * num_heads} heads",
        act=ActPart(heads=heads),
        first_token_scale=((1.0,) * num_heads,) * len(heads),
    )
