"""One weight matrix rounded to integers times scales: the numbers, whatever form a graph gives them.

Every form stores the same integers and scales: Q/DQ for TensorRT, MatMulNBits for ONNX Runtime. What differs is the
packing, which is theirs. onnxruntime's own quantiser is not used: it gives blocks a negative scale where it likes,
which TensorRT refuses, it knows no scale but absmax, and it takes whole matrices that are transposed already.

Everything is computed on demand and in slices, from a source that may itself be lazy, so that no second copy of the
model is held: only scales and zero points, which are small, are kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import onnx_ir as ir
from sinkrt.errors import UsageError, problem

CLIPPINGS = tuple(1.0 - 0.04 * i for i in range(16))
"""Shares of the absmax scale that ``mse`` tries: 1, 0.96, .. 0.4. What lies between is reached by least squares."""

SLICE_ELEMENTS = 1 << 16
"""Weights worked on at a time: few enough that they and two temporary arrays stay in a core's cache."""

_MIN_SLICE_OUTPUTS = 32


@dataclasses.dataclass(frozen=True)
class WeightScheme:
    """How a matrix is rounded: w = scale * (integer - zero point), zero point 0 if symmetric.

    bits: 8 or 4. block_size: inputs of one output that share a scale; None: all of them do (per channel).
    symmetric: integers are signed. 8 bits use -127 .. 127, as INT8 matmuls expect. 4 bits use all of -8 .. 7, with
    the least positive scale that clips nothing, max(-min / 8, max / 7): the 16th code makes steps finer by an eighth
    wherever the largest weight is negative, and costs nothing elsewhere. Asymmetric: 0 .. 2^bits - 1 with an integer
    zero point in that range; zero is always exact.
    scales: ``absmax``: nothing is clipped; ``mse``: the best of `CLIPPINGS` by squared error, then the least squares
    scale for the integers found; ``stored``: those of a quantised checkpoint, bit by bit, of either sign.
    scale_dtype: ``float32 | float16``, the type that scales are stored in; integers are computed with what it holds.
    """

    bits: Literal[8, 4]
    block_size: int | None = None
    symmetric: bool = True
    scales: Literal["absmax", "mse", "stored"] = "absmax"
    scale_dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size {self.block_size}")

    @property
    def lowest(self) -> int:
        """The least integer."""
        if not self.symmetric:
            return 0
        return -127 if self.bits == 8 else -8

    @property
    def highest(self) -> int:
        """The greatest integer."""
        if not self.symmetric:
            return 2**self.bits - 1
        return 127 if self.bits == 8 else 7


class _Steps(NamedTuple):
    """scales [N, G] float32; zero_points [N, G] uint8, None if symmetric."""

    scales: np.ndarray
    zero_points: np.ndarray | None


class Rounded(NamedTuple):
    """A matrix that was rounded by other rules than those here: w = scale * (integer - zero point).

    integers: [N, K], int8 if symmetric, else uint8. scales: float32 [N, G], > 0. zero_points: uint8 [N, G] or None.
    """

    integers: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A matrix of N outputs by K inputs, in G = ceil(K / block_size) groups an output (1 if per channel).

    name: of the weight, for names in the graph and for errors. source: [K, N], or [N, K] if `transposed` (as torch
    and embeddings have it; an embedding's rows are its outputs); any floating-point type.
    rounded: gives what the matrix was rounded to beforehand, under the same scheme; read anew for integers and for
    scales, so that it may come from a file. None: it is rounded here, each weight to the nearest.
    A last block that K does not fill is quantised as if zeros followed.
    """

    name: str
    source: ir.TensorProtocol
    scheme: WeightScheme
    transposed: bool = False
    rounded: Callable[[], Rounded] | None = None
    slice_elements: int = SLICE_ELEMENTS

    @property
    def num_outputs(self) -> int:
        """N."""
        return int(self.source.shape.numpy()[0 if self.transposed else 1])

    @property
    def num_inputs(self) -> int:
        """K."""
        return int(self.source.shape.numpy()[1 if self.transposed else 0])

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.scheme.block_size or self.num_inputs

    @property
    def num_groups(self) -> int:
        """G, scales of an output."""
        return -(-self.num_inputs // self.group_size)

    def scales(self) -> np.ndarray:
        """[N, G] in the scheme's scale_dtype, all > 0. Kept after the first call.

        Raises: UsageError naming the tensor if a weight is NaN or infinite.
        """
        return self._steps.scales.astype(self.scheme.scale_dtype)

    def zero_points(self) -> np.ndarray | None:
        """uint8 [N, G]; None if the scheme is symmetric. Kept after the first call.

        Raises: UsageError as `scales`.
        """
        return self._steps.zero_points

    def integers(self) -> np.ndarray:
        """[N, K], int8 if symmetric and uint8 otherwise, 4 bits too. Computed anew in every call.

        Raises: UsageError as `scales`.
        """
        if self.rounded is not None:
            return self.rounded().integers
        steps, scheme = self._steps, self.scheme
        result = np.empty((self.num_outputs, self.num_inputs), np.int8 if scheme.symmetric else np.uint8)
        for outputs, values in self._slices():
            values /= _by_group(steps.scales[outputs])
            np.rint(values, out=values)  # half to even, as QuantizeLinear rounds
            if steps.zero_points is not None:
                values += _by_group(steps.zero_points[outputs].astype(np.float32))
            np.clip(values, scheme.lowest, scheme.highest, out=values)
            flat = values.reshape(-1, values.shape[-1])[: self.num_inputs]  # [K, n]
            result[outputs] = flat.astype(result.dtype).T
        return result

    def unsigned(self) -> np.ndarray:
        """uint8 [N, K]: the integers from 0 on, 2^(bits - 1) standing for zero where the scheme is symmetric.

        Raises: UsageError as `scales`.
        """
        integers, scheme = self.integers(), self.scheme
        return (integers.astype(np.int16) + 2 ** (scheme.bits - 1)).astype(np.uint8) if scheme.symmetric else integers

    def dequantized(self) -> np.ndarray:
        """float32 [N, K]: what the integers stand for."""
        values = self.integers().astype(np.float32)
        for group in range(self.num_groups):
            columns = slice(group * self.group_size, (group + 1) * self.group_size)
            if self._steps.zero_points is not None:
                values[:, columns] -= self._steps.zero_points[:, group, None]
            values[:, columns] *= self._steps.scales[:, group, None]
        return values

    @functools.cached_property
    def _steps(self) -> _Steps:
        if self.rounded is not None:
            found = self.rounded()
            kept = self.scheme.scales == "stored"
            return _Steps(found.scales if kept else self._storable(found.scales), found.zero_points)
        scales = np.empty((self.num_outputs, self.num_groups), np.float32)
        zeros = None if self.scheme.symmetric else np.empty(scales.shape, np.uint8)
        for outputs, values in self._slices():
            step, zero = self._finest_unclipped(values)
            if self.scheme.scales == "mse":
                step = _least_squared_error(values, step, zero, self.scheme)
            scales[outputs] = self._storable(step).T
            if zeros is not None and zero is not None:
                zeros[outputs] = zero.T
        return _Steps(scales, zeros)

    def _slices(self) -> Iterator[tuple[slice, np.ndarray]]:
        """float32 [G, group_size, n] of some outputs at a time, zeros appended, free to be overwritten.

        Outputs are the last axis because that is how [K, N] lies in memory, and what is done for every group then
        runs along whole rows.
        """
        source = self.source.numpy()
        missing = self.num_groups * self.group_size - self.num_inputs
        step = max(self.slice_elements // max(self.num_inputs, 1), _MIN_SLICE_OUTPUTS)
        for start in range(0, self.num_outputs, step):
            outputs = slice(start, min(start + step, self.num_outputs))
            part = source[outputs].T if self.transposed else source[:, outputs]
            values = np.array(part, dtype=np.float32, order="C")
            if missing:
                values = np.concatenate([values, np.zeros((missing, values.shape[1]), np.float32)])
            yield outputs, values.reshape(self.num_groups, self.group_size, -1)

    def _finest_unclipped(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Scales float32 [G, n] and zero points uint8 [G, n] that clip nothing."""
        # Zero is always in the range: it has to be exact, and padding must not count.
        low, high = np.minimum(values.min(axis=1), 0.0), np.maximum(values.max(axis=1), 0.0)
        with np.errstate(over="ignore"):
            spread = high - low
        if not np.isfinite(spread).all():
            raise UsageError(
                problem(
                    f"weights '{self.name}'",
                    received="NaN or Inf",
                    expected="finite numbers",
                    fix="check the model, or use --dtype fp32 if it overflows fp16",
                )
            )
        scheme = self.scheme
        if scheme.symmetric:
            return self._storable(np.maximum(low / scheme.lowest, high / scheme.highest)), None
        scale = self._storable(spread / scheme.highest)
        return scale, np.clip(np.rint(-low / scale), 0, scheme.highest).astype(np.uint8)

    def _storable(self, scale: np.ndarray) -> np.ndarray:
        """The scale as its type holds it, in float32; 1 where that is 0 or subnormal, in groups as good as zero."""
        if self.scheme.scale_dtype == "float16":
            limit = float(np.finfo(np.float16).max)
            if (scale > limit).any():
                raise UsageError(
                    problem(
                        f"weights '{self.name}'",
                        received="a scale that overflows fp16",
                        expected=f"at most {limit:g}",
                        fix="use --dtype fp32",
                    )
                )
            scale = scale.astype(np.float16).astype(np.float32)
        return np.where(scale < np.finfo(np.float32).tiny, np.float32(1.0), scale).astype(np.float32)


def _by_group(values: np.ndarray) -> np.ndarray:
    """[n, G] -> [G, 1, n], to go with slices."""
    return np.ascontiguousarray(values.T)[:, None, :]


def _least_squared_error(
    values: np.ndarray, step: np.ndarray, zero: np.ndarray | None, scheme: WeightScheme
) -> np.ndarray:
    """Scales [G, n] for values [G, group_size, n], given those that clip nothing."""
    offset = None if zero is None else zero.astype(np.float32)[:, None, :]
    units = values / step[:, None, :]  # [G, group_size, n]
    exact, rounded = np.empty_like(units), np.empty_like(units)
    best_error = np.full(step.shape, np.inf, np.float32)
    best = np.ones_like(step)

    def round_to(inverse: np.ndarray | float) -> None:
        """exact = units * inverse, rounded = its integers; both without the zero point."""
        np.multiply(units, inverse, out=exact)
        if offset is not None:
            np.add(exact, offset, out=exact)
        np.rint(exact, out=rounded)
        np.clip(rounded, scheme.lowest, scheme.highest, out=rounded)

    for share in CLIPPINGS:
        round_to(1.0 / share)
        np.subtract(exact, rounded, out=exact)
        np.multiply(exact, exact, out=exact)
        error = exact.sum(axis=1) * np.float32(share * share)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best = np.where(better, np.float32(share), best)
    # For given integers the best scale is that of least squares; for a given scale the nearest integers are best.
    # So neither this step nor the rounding that follows it can make the error larger.
    round_to((1.0 / best)[:, None, :])
    if offset is not None:
        np.subtract(rounded, offset, out=rounded)
    np.multiply(units, rounded, out=exact)
    products = exact.sum(axis=1)
    np.multiply(rounded, rounded, out=exact)
    squares = exact.sum(axis=1)
    fits = (products > 0) & (squares > 0)
    return step * np.where(fits, products / np.where(fits, squares, 1.0), best).astype(np.float32)
