"""Weights of the CPU library and INT4 weights of the TensorRT plugin read back from their packed bytes.

plugins/cpu/kernels/linear.h and plugins/kernels/linear.h have the layouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from sinkexport.loading.checkpoints.file_tensor import Floats, Indices
from sinkexport.util.node_fields import read_fields

TILE = 16
PACKED = ".n16"
"""Suffix of the packed bytes of a weight."""

ROW_ORDER = "row_order"
"""Attribute of a node whose matrix has its rows in another order than the model's: which of them each is, as runs
``first:count``."""

BFLOAT16_STEP = 2.0**-8
"""Most that a number is changed by rounding to bfloat16, as a share of it."""

TILED, TILED_INPUTS = ".int4x8", 64
"""Suffix of the INT4 tiles of a weight, and inputs of a tile."""

At = Callable[[Indices, Indices], tuple[Floats, Floats]]
"""Rows and columns, of shapes that broadcast -> numbers and their steps, of that shape."""


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """A packed matrix: rows and columns [N, K], those of experts one below the other, [E * N, K].

    num_experts: E; 0: it is one matrix.
    """

    shape: tuple[int, int]
    num_experts: int
    at: At

    def read(self, rows: Indices, columns: Indices) -> tuple[Floats, Floats]:
        """[rows, columns]."""
        return self.at(rows[:, None], columns[None])

    @property
    def swapped_shape(self) -> tuple[int, int]:
        """[E * K, N], as some families keep experts."""
        return self.num_experts * self.shape[1], self.shape[0] // self.num_experts

    def read_swapped(self, rows: Indices, columns: Indices) -> tuple[Floats, Floats]:
        """[rows, columns] of `swapped_shape`."""
        depth, width = self.shape[1], self.swapped_shape[1]
        return self.at(rows[:, None] // depth * width + columns[None], rows[:, None] % depth)


def packed_rows(
    value: ir.Value, packed: npt.NDArray[Any], scales: npt.NDArray[Any] | None, zeros: npt.NDArray[Any] | None
) -> PackedRows:
    """What a constant holds.

    value: the constant, whose reader says how it lies. packed: uint8 [n]. scales, zeros: [(E,) tiles, groups, 16].
    """
    fields = _fields(value)
    depth = fields.get("in_features") or fields["row_length"]
    parts = 2 if fields.get("gated") else 1
    width = fields["out_features"] if "out_features" in fields else fields["num_rows"]
    tiles = parts * -(-width // TILE)
    bits = _bits(value)
    block = fields["block_size"]
    padded = -(-depth // 2) * 2 if scales is None else -(-depth // (block or 4)) * (block or 4)

    def places(rows: Indices) -> tuple[Indices, Indices]:
        """Tiles, counted over all matrices, and rows in them."""
        matrix, row = rows // (parts * width), rows % (parts * width)
        part, row = row // width, row % width
        return matrix * tiles + parts * (row // TILE) + part, row % TILE

    def at(rows: Indices, column: Indices) -> tuple[Floats, Floats]:
        tile, place = places(rows)
        if bits == 16:
            halves = packed.view(np.uint16).reshape(-1, padded // 2, TILE, 2)[tile, column // 2, place, column % 2]
            values = (halves.astype(np.uint32) << 16).view(np.float32)
            return values, np.abs(values) * np.float32(BFLOAT16_STEP)
        if scales is None:
            values = packed.view(np.float32).reshape(-1, depth, TILE)[tile, column, place]
            return values, np.zeros_like(values)
        group = column // block if block else np.zeros_like(column)
        step = scales.reshape(-1, scales.shape[-2], TILE)[tile, group, place].astype(np.float32)
        if bits == 8:
            codes = packed.view(np.int8).reshape(-1, padded // 4, TILE, 4)[tile, column // 4, place, column % 4]
            return codes.astype(np.float32) * step, step
        both = packed.reshape(-1, padded // 8, TILE, 4)[tile, column // 8, place, column % 4]
        codes = (both >> (column // 4 % 2 * 4).astype(np.uint8)) & 15
        zero: Any = 8 if zeros is None else zeros.reshape(-1, zeros.shape[-2], TILE)[tile, group, place]
        return (codes.astype(np.int16) - zero).astype(np.float32) * step, step

    places_of = row_places(value)
    num_experts = fields.get("num_experts", 0)
    if places_of is not None:
        count = parts * width  # rows of a matrix

        def reordered(rows: Indices, columns: Indices) -> tuple[Floats, Floats]:
            return at(rows // count * count + places_of[rows % count], columns)

        return PackedRows((max(num_experts, 1) * count, depth), num_experts, reordered)
    return PackedRows((max(num_experts, 1) * parts * width, depth), num_experts, at)


def row_places(value: ir.Value) -> Indices | None:
    """Where each of the model's rows is in a matrix or a bias [N] of reordered rows; None: in the model's order."""
    shown = next((use.node.attributes[ROW_ORDER] for use in value.uses() if ROW_ORDER in use.node.attributes), None)
    if shown is None:
        return None
    runs = [tuple(map(int, run.split(":"))) for run in shown.as_string().split(",")]
    return np.argsort(np.concatenate([np.arange(first, first + count) for first, count in runs]))


def tiled_rows(
    value: ir.Value, packed: npt.NDArray[Any], scales: npt.NDArray[Any], zeros: npt.NDArray[Any] | None
) -> PackedRows:
    """What INT4 tiles of the TensorRT plugin hold.

    Columns may be padded where the graph does not say how many there are.

    value: the constant. packed: int32 [(E,) tiles, steps, 128]. scales: [(E,) tiles, groups, 16]. zeros: int32 [.., 4].
    """
    fields = _fields(value)
    width = fields["num_rows"] if "num_rows" in fields else fields["num_outputs"]
    tiles, steps = packed.shape[-3:-1]
    depth = fields.get("row_length") or _width_of_input(value) or steps * TILED_INPUTS
    count = packed.shape[0] if packed.ndim == 4 else 0
    bytes_ = np.ascontiguousarray(packed).view(np.uint8).reshape(-1, steps, 8, 4, 2, 2, 4)
    points = None if zeros is None else np.ascontiguousarray(zeros).view(np.uint8).reshape(-1, scales.shape[-2], TILE)

    def at(rows: Indices, column: Indices) -> tuple[Floats, Floats]:
        tile, row = rows // width * tiles + rows % width // TILE, rows % width % TILE
        inner, of_word = column % TILED_INPUTS, np.array([0, 2, 1, 3])[column % 4]
        both = bytes_[tile, column // TILED_INPUTS, row % 8, inner // 8 % 4, inner // 32, inner // 4 % 2, of_word]
        codes = (both >> (row // 8 * 4).astype(np.uint8)) & 15
        group, place = column // fields["block_size"], row % 8 * 2 + row // 8
        step = scales.reshape(-1, scales.shape[-2], TILE)[tile, group, place].astype(np.float32)
        zero: Any = 8 if points is None else points[tile, group, place]
        return (codes.astype(np.int16) - zero).astype(np.float32) * step, step

    return PackedRows((max(count, 1) * width, depth), count, at)


def _width_of_input(value: ir.Value) -> int | None:
    """Length of the rows that are multiplied by a weight, if the graph has it."""
    x = next(iter(value.uses())).node.inputs[0]
    last = None if x is None or x.shape is None or not len(x.shape) else x.shape[-1]
    return last if isinstance(last, int) else None


def _fields(value: ir.Value) -> dict[str, Any]:
    """Fields of the node that reads a packed weight, of a matmul first."""
    found = [read_fields(use.node) for use in value.uses()]
    return next((fields for fields in found if "in_features" in fields), found[0])


def _bits(value: ir.Value) -> int:
    starts = {"Float": 32, "Bf16": 16, "Int8": 8, "Int4": 4}
    node = next(iter(value.uses())).node
    return next(bits for start, bits in starts.items() if node.op_type.startswith(start))
