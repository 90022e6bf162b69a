"""Take back the last tokens of a stream: what they overwrote in the ring is kept beside it."""

from __future__ import annotations

import numpy as np

from sinkrt.backends.state_memory import states_in_one_piece
from sinkrt.contract import Manifest, TensorSpec
from sinkrt.errors import UsageError, problem
from sinkrt.graph_runner import GraphRunner
from sinkrt.state_rows import StateRows
from sinkrt.stream_table import StreamTable


class Rewinder:
    """Keeps what up to `count` tokens of stream 0 overwrite, so that some of them can be taken back.

    Raises: UsageError for recurrent states, which have no rows, or windows of fewer than `count` tokens.
    """

    def __init__(self, runner: GraphRunner, table: StreamTable, manifest: Manifest, count: int) -> None:
        smallest = min((s.shape[2] for s in manifest.states if s.kind.startswith("window")), default=0)
        if manifest.is_recurrent or count > smallest:
            raise UsageError(
                problem(
                    "bundle to take tokens back from",
                    received="one with recurrent states" if manifest.is_recurrent else f"a window of {smallest} tokens",
                    expected=f"attention alone, and windows of {count} tokens or more",
                    fix="use another draft bundle",
                )
            )
        self._table, self._count, self._start = table, count, 0
        shapes = [(s.input, (*s.shape[:2], count, *s.shape[3:]), s.dtype) for s in manifest.states]
        arrays = states_in_one_piece([TensorSpec(*one) for one in shapes])
        kept = {name: array for (name, _, _), array in zip(shapes, arrays, strict=True)}
        states = {name: np.asarray(state) for name, state in runner.backend.states.items()}
        self._rows = StateRows(manifest.states, states, kept)

    def mark(self) -> None:
        """Keep what the next `count` tokens will overwrite."""
        self._start = int(self._table.position[0])
        self._rows.read(0, self._start, self._count)

    def back_to(self, position: int) -> None:
        """Take back all tokens from `position` on, which is not before the mark. Logits stay as they are."""
        done = position - self._start
        self._rows.write(0, position, done, int(self._table.position[0]) - position)
        self._table.position[0] = position
