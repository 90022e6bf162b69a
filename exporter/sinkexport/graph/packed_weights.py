"""Matrices in the layout of the CPU library (plugins/cpu/kernels/linear.h): tiles of 16 outputs, read as they lie.

They are packed while the weights file is written: no second copy of a model is held.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from sinkexport.graph.edit import lazy_weight
from sinkexport.quant.weight import QuantizedWeight

TILE = 16
"""Outputs that lie together."""

LAYOUT = "n16"
"""Name of the layout in a node's fields."""

PACKED, SCALES, ZERO_POINTS = f".{LAYOUT}", ".scales", ".zero_points"
"""Suffixes of the constants of one matrix."""

BLOCK_SIZES = (32, 64, 128)
"""Inputs that can share a scale; INT8 can have one for each output, too."""

SCALE_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
"""Types by the number that a node's field ``scale_type`` has for them."""

BY_HEAD = ".by_head"
"""Suffix of the name of a matrix, or of its bias, whose rows are in attention's order."""

ROW_ORDER = "row_order"
"""Attribute of the node of such a matrix, `shown_order` of its rows: for who compares weights, not for the library."""

_SOURCE = "packed from"
"""Key in the metadata of a packed weight: the `PackedMatrix` that it is of."""


@dataclasses.dataclass(frozen=True)
class Integers:
    """How a matrix was rounded: groups of block_size inputs share a scale, all of them if that is 0."""

    bits: int
    block_size: int
    scale_type: ir.DataType
    scales: Callable[[], np.ndarray]  # [N, G]
    zero_points: Callable[[], np.ndarray] | None  # uint8 [N, G]


@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """Matrices of N outputs by K inputs to be packed.

    rows: gives [E * N, K], float32, or integers: int8, or 0 .. 15 if they have 4 bits. num_experts: E; 0: one matrix.
    is_gated: rows are gates, then as many ups, whose tiles alternate. integers: None: float32, or bfloat16.
    order: which of the model's rows each is; None: they are in the model's order.
    """

    name: str
    num_outputs: int
    num_inputs: int
    rows: Callable[[], np.ndarray]
    integers: Integers | None = None
    is_gated: bool = False
    num_experts: int = 0
    is_bfloat16: bool = False
    order: tuple[int, ...] | None = None

    @property
    def num_tiles(self) -> int:
        """Tiles of a matrix."""
        parts = 2 if self.is_gated else 1
        return parts * -(-self.num_outputs // parts // TILE)

    @property
    def bits(self) -> int:
        """Bits of a stored weight."""
        if self.integers is not None:
            return self.integers.bits
        return 16 if self.is_bfloat16 else 32

    @property
    def num_groups(self) -> int:
        """Scales of an output."""
        block = self.integers.block_size if self.integers is not None else 0
        return -(-self.num_inputs // block) if block else 1

    @property
    def padded_inputs(self) -> int:
        """K as it is stored."""
        if self.integers is None:
            return -(-self.num_inputs // 2) * 2 if self.is_bfloat16 else self.num_inputs
        multiple = self.integers.block_size or 4
        return -(-self.num_inputs // multiple) * multiple

    def values(self, graph: ir.Graph) -> list[ir.Value]:
        """Constants of the graph: packed bytes uint8 [n], then scales and zero points [(E,) tiles, groups, 16]."""
        name = self.name if self.order is None else f"{self.name}{BY_HEAD}"
        count = max(self.num_experts, 1) * self.num_tiles * TILE * self.padded_inputs * self.bits // 8
        packed = lazy_weight(graph, f"{name}{PACKED}", ir.DataType.UINT8, (count,), self._bytes)
        packed.meta[_SOURCE] = self
        found = [packed]
        if self.integers is None:
            return found
        leading = (self.num_experts,) if self.num_experts else ()
        shape = (*leading, self.num_tiles, self.num_groups, TILE)
        of_groups = [(SCALES, self.integers.scale_type, self.integers.scales)]
        if self.integers.zero_points is not None:
            of_groups.append((ZERO_POINTS, ir.DataType.UINT8, self.integers.zero_points))
        for suffix, dtype, make in of_groups:
            tiled = functools.partial(self._tiled_groups, make, dtype, shape)
            found.append(lazy_weight(graph, f"{name}{suffix}", dtype, shape, tiled))
        return found

    def reordered(self, rows: np.ndarray) -> PackedMatrix:
        """The same matrix, or matrices, with outputs in another order. rows: int64 [N], a permutation."""
        integers, order = self.integers, tuple(rows.tolist())
        if self.num_experts:
            rows = (np.arange(self.num_experts)[:, None] * self.num_outputs + rows).reshape(-1)
        if integers is not None:
            zeros = integers.zero_points
            integers = dataclasses.replace(
                integers,
                scales=functools.partial(_taken, integers.scales, rows),
                zero_points=None if zeros is None else functools.partial(_taken, zeros, rows),
            )
        taken = functools.partial(_taken, self.rows, rows)
        return dataclasses.replace(self, rows=taken, integers=integers, order=order)

    def _bytes(self) -> np.ndarray:
        rows = self._in_tiles(self.rows())  # [.., tiles, 16, K]
        missing = self.padded_inputs - self.num_inputs
        if missing:
            rows = np.pad(rows, [*[(0, 0)] * (rows.ndim - 1), (0, missing)])
        *tiles, depth = rows.shape
        if self.integers is None and self.is_bfloat16:
            halves: np.ndarray = rows.astype(ml_dtypes.bfloat16).view(np.uint16)  # to the nearest, ties to even
            packed = np.moveaxis(halves.reshape(*tiles, depth // 2, 2), -3, -2)
        elif self.integers is None:
            packed = np.swapaxes(rows, -1, -2)
        elif self.integers.bits == 8:
            packed = np.moveaxis(rows.reshape(*tiles, depth // 4, 4), -3, -2)
        else:
            halves = rows.reshape(*tiles, depth // 8, 2, 4)
            packed = np.moveaxis(halves[..., 0, :] | (halves[..., 1, :] << 4), -3, -2)
        return np.ascontiguousarray(packed).reshape(-1).view(np.uint8)

    def _tiled_groups(self, make: Callable[[], np.ndarray], dtype: ir.DataType, shape: Sequence[int]) -> np.ndarray:
        """[E * N, G] -> [(E,) tiles, G, 16]."""
        tiled = np.swapaxes(self._in_tiles(make().astype(dtype.numpy())), -1, -2)
        return np.ascontiguousarray(tiled).reshape(shape)

    def _in_tiles(self, rows: np.ndarray) -> np.ndarray:
        """[E * N, n] -> [E, tiles, 16, n], padded with zeros; tiles of gates and ups alternate."""
        parts = 2 if self.is_gated else 1
        width = self.num_outputs // parts
        tiles = self.num_tiles // parts
        whole = rows.reshape(max(self.num_experts, 1), parts, width, rows.shape[-1])
        if missing := tiles * TILE - width:
            whole = np.pad(whole, ((0, 0), (0, 0), (0, missing), (0, 0)))
        whole = whole.reshape(len(whole), parts, tiles, TILE, rows.shape[-1])
        return whole.swapaxes(1, 2).reshape(len(whole), tiles * parts, TILE, rows.shape[-1])


def shown_order(rows: Sequence[int]) -> str:
    """Which of the model's rows each is, as runs ``first:count`` with commas between them."""
    places = np.asarray(rows)
    begins = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
    return ",".join(f"{places[a]}:{b - a}" for a, b in itertools.pairwise(begins))


def packed_source(weight: ir.Value) -> PackedMatrix | None:
    """What a packed weight is made of, in a graph that is not written yet."""
    found: PackedMatrix | None = weight.meta.get(_SOURCE)
    return found


def packed_floats(name: str, transposed: ir.TensorProtocol, *, is_bfloat16: bool = False) -> PackedMatrix:
    """A float32 matrix [N, K], rounded to bfloat16 where that is asked for."""
    num_outputs, num_inputs = (int(n) for n in transposed.shape.numpy())
    return PackedMatrix(name, num_outputs, num_inputs, transposed.numpy, is_bfloat16=is_bfloat16)


def packed_integers(weight: QuantizedWeight, num_experts: int = 0) -> PackedMatrix | None:
    """A rounded matrix, or those of experts one below the other; None: of a scheme that the library has no kernels for.

    Scales of blocks are stored in float16, which halves what they add to the bytes of a step. Those of a quantised
    checkpoint are only where that changes none.
    """
    scheme = weight.scheme
    block = scheme.block_size or 0
    if block not in BLOCK_SIZES and (block or scheme.bits == 4):
        return None
    if scheme.bits == 8 and not scheme.symmetric:
        return None
    if block and (scheme.scales != "stored" or holds_half(weight.scales())):
        weight = dataclasses.replace(weight, scheme=dataclasses.replace(scheme, scale_dtype="float16"))
    zeros = None if scheme.symmetric else functools.partial(_zero_points, weight)
    rows = weight.integers if scheme.bits == 8 else weight.unsigned
    scale_type = ir.DataType.FLOAT16 if weight.scheme.scale_dtype == "float16" else ir.DataType.FLOAT
    integers = Integers(scheme.bits, block, scale_type, weight.scales, zeros)
    outputs = weight.num_outputs // max(num_experts, 1)
    return PackedMatrix(weight.name, outputs, weight.num_inputs, rows, integers, num_experts=num_experts)


def holds_half(scales: np.ndarray) -> bool:
    """Whether float16 holds these scales exactly."""
    with np.errstate(over="ignore"):
        return bool((scales.astype(np.float16).astype(np.float32) == scales).all())


def _taken(make: Callable[[], np.ndarray], rows: np.ndarray) -> np.ndarray:
    taken: np.ndarray = make()[rows]
    return taken


def _zero_points(weight: QuantizedWeight) -> np.ndarray:
    zeros = weight.zero_points()
    if zeros is None:
        raise ValueError(f"'{weight.name}' is symmetric")
    return zeros
