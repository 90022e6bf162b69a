"""What calibration keeps of the inputs that it sees: channels' largest values, and histograms.

Sinks are kept apart from the first token on: they carry activations hundreds of times those of any other token, so that
one range for both would leave the others nothing. All that is kept is the same in whatever order tokens come, so a
calibration that was cut short goes on to the very same result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from sinkexport.calibration import histogram
from sinkexport.calibration.stream_inputs import Observer

REST, SINKS = 0, 1
"""First axis of what is kept."""

Arrays = dict[str, npt.NDArray[np.generic]]


class Resumable(Protocol):
    """What can be written to a file and read back."""

    def state(self) -> Arrays:
        """All that it holds."""

    def restore(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Go on from a `state`."""


class ResumableObserver(Observer, Resumable, Protocol):
    """An observer whose state can be kept."""


class ChannelMaxima:
    """The largest absolute value of each channel, float32 [2, K] by module: of the rest, and of sinks; 0 if none."""

    def __init__(self) -> None:
        self.maxima: dict[str, npt.NDArray[np.float32]] = {}

    def update(self, module: str, inputs: torch.Tensor, is_sink: torch.Tensor) -> None:
        """See `Observer`."""
        absolute = inputs.detach().float().abs().numpy()  # [n, K]
        known = self.maxima.setdefault(module, np.zeros((2, absolute.shape[1]), np.float32))
        sinks = is_sink.numpy()
        for kind, rows in ((REST, absolute[~sinks]), (SINKS, absolute[sinks])):
            np.maximum(known[kind], rows.max(axis=0, initial=0.0), out=known[kind])

    def counted(self, module: str, *, with_sinks: bool) -> npt.NDArray[np.float32]:
        """[K]: of the rest alone, or of all tokens."""
        maxima = self.maxima[module]
        return maxima.max(axis=0) if with_sinks else maxima[REST]

    def state(self) -> Arrays:
        """See `Resumable`."""
        return dict(self.maxima)

    def restore(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """See `Resumable`."""
        self.maxima = {name: np.array(value, np.float32) for name, value in state.items()}


class Histograms:
    """Counts of absolute values, int64 [2, NUM_BINS] by module, and the largest, float32 [2].

    divisors: [K] by module, what channels are divided by first; a module that is missing is taken as it is.
    """

    def __init__(self, divisors: Mapping[str, npt.NDArray[np.float32]] | None = None) -> None:
        self.counts: dict[str, histogram.Counts] = {}
        self.highest: dict[str, npt.NDArray[np.float32]] = {}
        self._divisors = divisors or {}

    def update(self, module: str, inputs: torch.Tensor, is_sink: torch.Tensor) -> None:
        """See `Observer`."""
        values = inputs.detach().float().numpy()  # [n, K]
        if module in self._divisors:
            values = values / self._divisors[module]
        counts = self.counts.setdefault(module, np.zeros((2, histogram.NUM_BINS), np.int64))
        highest = self.highest.setdefault(module, np.zeros(2, np.float32))
        sinks = is_sink.numpy()
        for kind, rows in ((REST, values[~sinks]), (SINKS, values[sinks])):
            counts[kind] += histogram.count(rows)
            highest[kind] = max(highest[kind], np.abs(rows).max(initial=0.0))

    def state(self) -> Arrays:
        """See `Resumable`."""
        return {f"counts/{name}": value for name, value in self.counts.items()} | {
            f"highest/{name}": value for name, value in self.highest.items()
        }

    def restore(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """See `Resumable`."""
        parts = {name: name.partition("/") for name in state}
        self.counts = {rest: np.array(state[n], np.int64) for n, (kind, _, rest) in parts.items() if kind == "counts"}
        self.highest = {
            rest: np.array(state[n], np.float32) for n, (kind, _, rest) in parts.items() if kind == "highest"
        }
