"""The file of per-head windows, for people to review and for `export --head-windows`.

Some heads look far back (retrieval heads), most look at the sinks and at what is near (streaming heads; DuoAttention,
arXiv:2410.10819). A head with a window of W_h tokens keeps the sinks and the last W_h; its in-cache positions are those
of a cache of S + W_h. JSON with one line a layer: the window of each of its key heads.
`sinkexport analyze --head-windows` proposes one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import pydantic
from sinkrt.contract import HeadWindow

from sinkexport.variants.head_file import HeadFile, ModelOfFile

FORMAT: Literal["sinkexport budgets"] = "sinkexport budgets"
FILE_SCHEMA_VERSION: Literal[1] = 1
Window = Annotated[int, pydantic.Field(ge=1, strict=True)]


class WindowedModel(ModelOfFile):
    """Model of a file of per-head windows."""

    num_kv_heads: int = pydantic.Field(ge=1)

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads


class HeadWindowFile(HeadFile):
    """windows: [L][Hkv], tokens. found: how, in words; nothing reads it."""

    OPTION = "--head-windows"
    ROWS = "windows"
    HEADS = "key heads"
    MADE_BY = "sinkexport analyze --head-windows"
    DOCS = "docs/head_windows.md"
    FIX = "analyze this model"

    format: Literal["sinkexport budgets"] = FORMAT
    schema_version: Literal[1] = FILE_SCHEMA_VERSION
    model: WindowedModel
    found: str = ""
    windows: tuple[tuple[Window, ...], ...]

    @property
    def longest(self) -> int:
        """W of the bundle."""
        return max(max(layer) for layer in self.windows)


def head_groups(layer: int, windows: Sequence[int]) -> tuple[HeadWindow, ...]:
    """Key heads of a layer by their window, longest first. windows: [Hkv]."""
    return tuple(
        HeadWindow(
            layer=layer,
            kv_heads=tuple(head for head, own in enumerate(windows) if own == window),
            window_size=window,
        )
        for window in sorted(set(windows), reverse=True)
    )
