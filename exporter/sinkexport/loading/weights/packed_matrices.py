"""Weights of the CPU library read back from its packed bytes; plugins/cpu/kernels/linear.h has the layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from sinkexport.loading.checkpoints.file_tensor import Floats, Indices

TILE = 16
PACKED = ".n16"
"""Suffix of the packed bytes of a weight."""

Numbers = Callable[[Indices, Indices], tuple[Floats, Floats]]


def read_packed(
    value: ir.Value, packed: npt.NDArray[Any], scales: npt.NDArray[Any] | None, zeros: npt.NDArray[Any] | None
) -> tuple[tuple[int, int], Numbers]:
    """Shape of a packed matrix, [N, K], and what reads its numbers and steps.

    value: the constant, whose reader says how it lies. packed: uint8 [n]. scales, zeros: [(E,) tiles, groups, 16]. Of
    experts the rows follow each other, [E * N, K].
    """
    fields = _fields(value)
    depth = fields.get("in_features") or fields["row_length"]
    parts = 2 if fields.get("gated") else 1
    width = fields["out_features"] if "out_features" in fields else fields["num_rows"]
    tiles = parts * -(-width // TILE)
    bits = 32 if scales is None else _bits(value)
    block = fields["block_size"]
    padded = depth if scales is None else -(-depth // (block or 4)) * (block or 4)

    def places(rows: Indices) -> tuple[Indices, Indices]:
        """Tiles, counted over all matrices, and rows in them."""
        matrix, row = rows // (parts * width), rows % (parts * width)
        part, row = row // width, row % width
        return matrix * tiles + parts * (row // TILE) + part, row % TILE

    def read(rows: Indices, columns: Indices) -> tuple[Floats, Floats]:
        tile, place = (index[:, None] for index in places(rows))
        column = columns[None]
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

    return (max(fields.get("num_experts", 0), 1) * parts * width, depth), read


def _fields(value: ir.Value) -> dict[str, Any]:
    """Fields of the node that reads a packed weight, of a matmul first."""
    nodes = sorted((use.node for use in value.uses()), key=lambda node: "in_features" not in node.attributes)
    return {name: attribute.value for name, attribute in nodes[0].attributes.items()}


def _bits(value: ir.Value) -> int:
    return 4 if any(use.node.op_type.startswith("Int4") for use in value.uses()) else 8
