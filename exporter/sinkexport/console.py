"""What commands share on the terminal."""

from __future__ import annotations

import sys

from rich.console import Console

PIPED_WIDTH = 120
"""Columns of a table that goes to a file or a pipe, where there is no terminal to ask."""


def table_console() -> Console:
    """A console on stdout for tables: as wide as the terminal, plain and of a fixed width elsewhere."""
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
