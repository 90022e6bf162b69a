"""Progress of long work, and the bars that show it on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Report = Callable[[str, int, int], None]
"""Called with the progress of the work: (stage, done, total)."""


def silent(_stage: str, _done: int, _total: int) -> None:
    """A `Report` that shows nothing."""


@contextmanager
def shown_progress(stages: Mapping[str, str]) -> Iterator[Report]:
    """Show a bar for each stage, in the order in which they begin; nothing where stderr is a file or a pipe.

    stages: what to call each stage on the terminal.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr), transient=True, disable=not sys.stderr.isatty()) as bar:
        tasks = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for earlier in bar.tasks:  # stages follow each other, and some do not report their end
                    bar.update(earlier.id, completed=earlier.total)
                tasks[stage] = bar.add_task(stages[stage], total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield show
