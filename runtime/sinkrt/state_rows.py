"""Rows of some tokens in the states of attention: written where a step would write them, or read from there.

Token t goes to sink t if t < S, else to slot (t - S) mod W. States of one shape that lie at equal distances in memory
are written by one assignment for all layers: in a model of 30 layers that takes a tenth of the time.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.lib.stride_tricks import as_strided

from sinkrt.contract import StateSpec


@dataclasses.dataclass(frozen=True)
class _Group:
    """States of one shape. states: [L, B, Hkv, S or W, ..]. rows: [L, B, Hkv, T, ..]. num_sinks: S of their caches."""

    states: np.ndarray
    rows: np.ndarray
    num_sinks: int
    holds_sinks: bool

    def pieces(self, position: int, count: int) -> list[tuple[int, int, int]]:
        """Places of tokens position .. position + count - 1 here: first place, first token of them, how many."""
        sinks = min(max(self.num_sinks - position, 0), count)  # tokens that are sinks
        if self.holds_sinks:
            return [(position, 0, sinks)] if sinks else []
        if sinks == count:
            return []
        window_size = self.states.shape[3]
        slot = (position + sinks - self.num_sinks) % window_size
        before_end = min(count - sinks, window_size - slot)
        found = [(slot, sinks, before_end)]
        if rest := count - sinks - before_end:
            found.append((0, sinks + before_end, rest))
        return found


class StateRows:
    """Rows of up to T tokens of each stream, and the states that they belong to.

    specs: of the states, those of attention alone. states: by input name, [B, Hkv, S or W, ..]. rows: by the same
    names, [B, Hkv, T, ..]; sinks and a window of one type may have the same.
    """

    def __init__(
        self, specs: Sequence[StateSpec], states: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray]
    ) -> None:
        num_sinks = {
            spec.input.replace("sink_k", "window_k", 1): spec.shape[2] for spec in specs if spec.kind == "sink_k"
        }
        members: dict[tuple[object, ...], list[str]] = {}
        for spec in specs:
            window = spec.input.replace(spec.kind, "window_k", 1)
            key = (spec.kind, spec.shape, spec.dtype, num_sinks.get(window, 0))
            members.setdefault(key, []).append(spec.input)
        self._groups = []
        for (kind, _, _, sinks), names in members.items():
            arrays, sources = [states[name] for name in names], [rows[name] for name in names]
            together = [_stacked(arrays), _stacked(sources)]
            if together[0] is not None and together[1] is not None:
                pairs = [(together[0], together[1])]
            else:
                pairs = [(a[None], b[None]) for a, b in zip(arrays, sources, strict=True)]
            is_sink = str(kind).startswith("sink")
            self._groups += [_Group(a, b, int(str(sinks)), is_sink) for a, b in pairs]

    def write(self, stream: int, position: int, first: int, count: int) -> None:
        """Write rows first .. first + count - 1 of a stream, the first of them the token at `position`."""
        for group in self._groups:
            for place, token, length in group.pieces(position, count):
                source = group.rows[:, stream, :, first + token : first + token + length]
                group.states[:, stream, :, place : place + length] = source

    def read(self, stream: int, position: int, count: int) -> None:
        """Take what lies where the tokens from `position` on would go, into rows 0 .. count - 1."""
        for group in self._groups:
            for place, token, length in group.pieces(position, count):
                source = group.states[:, stream, :, place : place + length]
                group.rows[:, stream, :, token : token + length] = source


def _stacked(arrays: Sequence[np.ndarray]) -> np.ndarray | None:
    """Arrays of one shape as one, [L, ..], in the memory where they are; None: they do not lie at equal distances."""
    first = arrays[0]
    addresses = [array.ctypes.data for array in arrays]
    steps = {after - before for before, after in itertools.pairwise(addresses)}
    owners = {id(_owner(array)) for array in arrays}
    if len(steps) > 1 or len(owners) > 1 or any(array.strides != first.strides for array in arrays):
        return None
    step = steps.pop() if steps else 0
    return as_strided(first, (len(arrays), *first.shape), (step, *first.strides))


def _owner(array: np.ndarray) -> object:
    """What owns an array's memory, and keeps it."""
    owner: object = array
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    return owner
