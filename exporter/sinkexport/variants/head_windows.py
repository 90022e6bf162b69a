"""The file that gives each key head a window of its own, for people to review and for `export --budgets`.

Some heads look far back (retrieval heads), most look at the sinks and at what is near (streaming heads; DuoAttention,
arXiv:2410.10819). A head with a budget of W_h tokens keeps the sinks and the last W_h; its in-cache positions are those
of a cache of S + W_h. JSON with one line a layer: the window of each of its key heads. `sinkexport analyze --budgets`
proposes one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import pydantic
from sinkrt.contract import HeadWindow, Manifest
from sinkrt.errors import UsageError, problem

from sinkexport.variants.head_file import HeadFile, ModelOfFile

if TYPE_CHECKING:
    from sinkexport.analysis.sinks import SinkReport

FORMAT: Literal["sinkexport budgets"] = "sinkexport budgets"
FILE_SCHEMA_VERSION: Literal[1] = 1
Window = Annotated[int, pydantic.Field(ge=1, strict=True)]


class BudgetedModel(ModelOfFile):
    """Of what model the budgets are."""

    num_kv_heads: int = pydantic.Field(ge=1)

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads


class BudgetFile(HeadFile):
    """windows: [L][Hkv], tokens. found: how, in words; nothing reads it."""

    OPTION = "--budgets"
    ROWS = "windows"
    HEADS = "key heads"
    MADE_BY = "sinkexport analyze --budgets"
    DOCS = "docs/budgets.md"
    FIX = "analyze this model"

    format: Literal["sinkexport budgets"] = FORMAT
    schema_version: Literal[1] = FILE_SCHEMA_VERSION
    model: BudgetedModel
    found: str = ""
    windows: tuple[tuple[Window, ...], ...]

    @property
    def longest(self) -> int:
        """W of the bundle."""
        return max(max(layer) for layer in self.windows)


def head_groups(layer: int, windows: Sequence[int]) -> tuple[HeadWindow, ...]:
    """Key heads of a layer by their window, longest first. windows: [Hkv]."""
    return tuple(
        HeadWindow(layer, tuple(head for head, own in enumerate(windows) if own == window), window)
        for window in sorted(set(windows), reverse=True)
    )


def propose(
    report: SinkReport, architecture: str, *, longest: int, shortest: int, share: float
) -> tuple[BudgetFile, float]:
    """A window of `longest` tokens for the key heads that need it most, `shortest` for the others.

    share: of the memory that windows of `longest` would take in all heads; as many heads keep it as fit in. Which:
    those whose output would change most with a window of `shortest` tokens (of the next smaller size that was
    measured), a key head as much as its query heads together. Returns: the budgets, and the largest such change of a
    key head that is cut short.

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
    model = BudgetedModel(
        name=report.model, architecture=architecture, num_layers=lost.shape[0], num_kv_heads=lost.shape[1]
    )
    found = (
        f"analyze, {report.num_windows} windows of {report.window_tokens} tokens: {num_long} of {lost.size} key "
        f"heads long; the output of no other changes by more than {largest:.1%}"
    )
    shaped = tuple(tuple(int(w) for w in layer) for layer in windows.reshape(lost.shape))
    return BudgetFile(model=model, found=found, windows=shaped), largest


def check_proposal(longest: int, shortest: int, share: float) -> None:
    """Raises: UsageError unless 1 <= shortest < longest, and `shortest` tokens in all heads fit into the share."""
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
            problem("--budget-share", received=share, expected=least, fix="change it, or lower --short-window")
        )


def budgets_of(manifest: Manifest) -> BudgetFile | None:
    """Those of a bundle; None: all of its heads keep W tokens."""
    if manifest.head_windows is None:
        return None
    facts = manifest.model
    by_head = {(group.layer, head): group.window_size for group in manifest.head_windows for head in group.kv_heads}
    windows = tuple(
        tuple(by_head.get((layer, head), manifest.stream.window_size) for head in range(facts.num_kv_heads))
        for layer in range(facts.num_layers)  # without entry: no cache, but linear attention
    )
    model = BudgetedModel(
        name=facts.name, architecture=facts.architecture, num_layers=facts.num_layers, num_kv_heads=facts.num_kv_heads
    )
    return BudgetFile(model=model, windows=windows)
