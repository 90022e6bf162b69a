"""All matrices of a model rounded with GPTQ for the text that is streamed, and the file that keeps them.

The moments of one input take K^2 numbers, so inputs are taken in batches that fit the memory, one pass over the text
for each. All of them are those of the model in floating point, so the batches do not change the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import torch
from sinkrt.errors import UsageError, problem

from sinkexport.calibration.gptq import rounded_for_inputs
from sinkexport.calibration.observers import Arrays
from sinkexport.quant.weight import Rounded, WeightScheme
from sinkexport.util.progress import Report, silent

INTEGERS, SCALES, ZERO_POINTS = "integers", "scales", "zero_points"


class SecondMoments:
    """Sums of x x^T, float32 [K, K] by module: of all tokens, the sinks too (see `gptq`)."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def update(self, module: str, inputs: torch.Tensor, is_sink: torch.Tensor) -> None:  # noqa: ARG002 - as all
        """See `stream_inputs.Observer`."""
        x = inputs.detach().float()  # [n, K]
        total = self.sums.setdefault(module, torch.zeros(x.shape[1], x.shape[1]))
        total.addmm_(x.T, x)

    def state(self) -> Arrays:
        """See `observers.Resumable`."""
        return {name: total.numpy() for name, total in self.sums.items()}

    def restore(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """See `observers.Resumable`."""
        self.sums = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in state.items()}


class RoundedArrays:
    """Results of `round_batch` so far."""

    def __init__(self) -> None:
        self.arrays: Arrays = {}

    def add(self, arrays: Arrays) -> None:
        """Take more of them."""
        self.arrays |= arrays

    def has(self, groups: Mapping[str, tuple[str, ...]]) -> bool:
        """Whether these groups' weights are here already."""
        return any(f"{name}.{SCALES}" in self.arrays for members in groups.values() for name in members)

    def state(self) -> Arrays:
        """See `observers.Resumable`."""
        return dict(self.arrays)

    def restore(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """See `observers.Resumable`."""
        self.arrays = dict(state)


def batches(groups: Mapping[str, tuple[str, ...]], model: Any, max_bytes: int) -> Iterator[dict[str, tuple[str, ...]]]:
    """Groups of layers (`stream_inputs.input_groups`) in batches of moments of at most `max_bytes`, or of one group."""
    batch: dict[str, tuple[str, ...]] = {}
    taken = 0
    for first, members in groups.items():
        needed = 4 * model.get_submodule(first).in_features ** 2
        if batch and taken + needed > max_bytes:
            yield batch
            batch, taken = {}, 0
        batch[first] = members
        taken += needed
    if batch:
        yield batch


def round_batch(
    model: Any,
    groups: Mapping[str, tuple[str, ...]],
    moments: SecondMoments,
    schemes: Mapping[str, WeightScheme],
    report: Report = silent,
) -> Arrays:
    """The matrices of these groups that have a scheme, as `RoundedFile` reads them.

    Raises: UsageError naming a weight that is NaN or infinite.
    """
    arrays: Arrays = {}
    for done, (first, members) in enumerate(groups.items()):
        report("round", done, len(groups))
        for name in members:
            if name not in schemes:
                continue
            weight = model.get_submodule(name).weight
            if not bool(torch.isfinite(weight).all()):
                raise UsageError(
                    problem(
                        f"weights '{name}.weight'",
                        received="NaN or Inf",
                        expected="finite numbers",
                        fix="check the model",
                    )
                )
            arrays |= _packed(name, rounded_for_inputs(weight, moments.sums[first], schemes[name]), schemes[name])
    report("round", len(groups), len(groups))
    return arrays


class RoundedFile:
    """Rounded matrices in a safetensors file, read when they are asked for.

    Raises: UsageError if it is not there or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safetensors.safe_open(path, "np") as file:
                self._names = frozenset(file.keys())
        except (OSError, safetensors.SafetensorError) as error:
            raise UsageError(
                problem(
                    "rounded weights",
                    received=f"'{path}' ({error})",
                    expected="the file that 'sinkexport calibrate' wrote beside its ranges",
                    fix="keep the two together, or calibrate again",
                )
            ) from None

    def __contains__(self, module: str) -> bool:
        return f"{module}.{SCALES}" in self._names

    def read(self, module: str, scheme: WeightScheme, num_inputs: int) -> Rounded:
        """The matrix of a module, [N, num_inputs], rounded under `scheme`."""
        with safetensors.safe_open(self._path, "np") as file:
            integers = file.get_tensor(f"{module}.{INTEGERS}")
            scales = file.get_tensor(f"{module}.{SCALES}")
            zeros = None if scheme.symmetric else file.get_tensor(f"{module}.{ZERO_POINTS}")
        return Rounded(_unpacked(integers, scheme, num_inputs), scales, zeros)


def _packed(name: str, rounded: Rounded, scheme: WeightScheme) -> Arrays:
    """4 bits: integers from 0, two to a byte, the first one low, a last one of 0 where K is odd."""
    integers = rounded.integers
    if scheme.bits == 4:
        codes = (integers.astype(np.int16) - scheme.lowest).astype(np.uint8)
        codes = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
        integers = codes[:, 0::2] | (codes[:, 1::2] << 4)
    arrays = {f"{name}.{INTEGERS}": np.ascontiguousarray(integers), f"{name}.{SCALES}": rounded.scales}
    if rounded.zero_points is not None:
        arrays[f"{name}.{ZERO_POINTS}"] = rounded.zero_points
    return arrays


def _unpacked(integers: npt.NDArray[Any], scheme: WeightScheme, num_inputs: int) -> npt.NDArray[Any]:
    if scheme.bits == 8:
        return integers
    codes = np.stack((integers & 15, integers >> 4), axis=-1).reshape(len(integers), -1)[:, :num_inputs]
    return codes if not scheme.symmetric else (codes.astype(np.int8) + np.int8(scheme.lowest))
