"""What commands share on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from sinkrt.errors import printable

PIPED_WIDTH = 120
"""Columns of a table that goes to a file or a pipe, where there is no terminal to ask."""


class _PlainConsole(Console):
    """A console that shows control characters as escapes: names come from files of strangers."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            lines = segment.text.split("\n")
            if segment.control or all(line.isprintable() for line in lines):
                yield segment
            else:
                yield segment._replace(text="\n".join(map(printable, lines)))


def table_console() -> Console:
    """A console on stdout for tables: as wide as the terminal, plain and of a fixed width elsewhere."""
    return _PlainConsole(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
