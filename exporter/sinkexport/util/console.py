"""Output of commands on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text
from sinkrt.errors import printable

PIPED_WIDTH = 120
"""Width of a table that goes to a file or a pipe, columns."""


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
    """Create a console on stdout for tables: as wide as the terminal, plain and of a fixed width elsewhere."""
    return _PlainConsole(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


def facts_table(rows: Iterable[tuple[str, str]]) -> Table:
    """Make a table of names and values. They are no markup: names may hold what rich takes for it."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def listed(items: Iterable[object]) -> str:
    """Join items with commas; "none" without any."""
    return ", ".join(str(item) for item in items) or "none"


def geometry(num_sink_tokens: int, window_size: int, *, has_attention: bool) -> str:
    """Name the cache's geometry in short, as in ``S=4 W=1020``; without attention it has none."""
    return f"S={num_sink_tokens} W={window_size}" if has_attention else "no attention"


def counted(count: int | None, noun: str) -> str:
    """Format a number with its noun: ``1 layer``, ``2 layers``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def megabytes(size: int) -> str:
    """Format bytes as MB (1e6 bytes): one decimal, or two digits of what would be 0.0."""
    if 0 < size < 50_000:
        return f"{float(f'{size / 1e6:.1e}'):.6f}".rstrip("0")
    return f"{size / 1e6:.1f}"
