"""INT4 weights in the layout of the TensorRT plugin's kernels (plugins/kernels/linear.h): 16 bytes are a lane's share.

They are packed while the weights file is written: no second copy of a model is held.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from sinkexport.graph.edit import lazy_weight
from sinkexport.quant.weight import QuantizedWeight

TILE_OUTPUTS, TILE_INPUTS, TILE_BYTES = 16, 64, 512
BLOCK_SIZES = (32, 64, 128)
"""Inputs that share a scale."""

PACKED = "int4x8"
"""Suffix of the tiles of a weight."""

INPUTS_MULTIPLE = 8
"""Inputs that a kernel reads at once."""

SYMMETRIC_ZERO = 8


def tiles(integers: np.ndarray) -> np.ndarray:
    """uint8 [.., N, K] of 0 .. 15 -> uint8 [.., N / 16, K / 64, 512], padded with the code of a symmetric zero."""
    whole = _padded(integers, TILE_OUTPUTS, TILE_INPUTS, SYMMETRIC_ZERO)
    *leading, rows, depth = whole.shape
    # Rows as (tile, far, g); inputs as (tile, half, t, word, pair, of pair): 64 = 2 * 4 * 2 * 2 * 2.
    parts = whole.reshape(*leading, rows // TILE_OUTPUTS, 2, 8, depth // TILE_INPUTS, 2, 4, 2, 2, 2)
    bytes_ = parts[..., 0, :, :, :, :, :, :, :] | (parts[..., 1, :, :, :, :, :, :, :] << 4)
    # (tile, g, steps, half, t, word, pair, of pair) -> (tile, steps, g, t, half, word, of pair, pair)
    ordered = np.moveaxis(bytes_, (-7, -6, -5, -4, -3, -2, -1), (-6, -7, -4, -5, -3, -1, -2))
    return np.ascontiguousarray(ordered).reshape(*leading, rows // TILE_OUTPUTS, depth // TILE_INPUTS, TILE_BYTES)


def groups(values: np.ndarray) -> np.ndarray:
    """[.., N, G], scales or zero points -> [.., N / 16, G, 16], outputs in the order 0, 8, 1, 9, .., 7, 15."""
    whole = _padded(values, TILE_OUTPUTS, 1, 0)
    *leading, rows, count = whole.shape
    parts = whole.reshape(*leading, rows // TILE_OUTPUTS, 2, 8, count)
    return np.ascontiguousarray(np.moveaxis(parts, (-3, -2, -1), (-1, -2, -3))).reshape(
        *leading, rows // TILE_OUTPUTS, count, TILE_OUTPUTS
    )


def stored_int4(graph: ir.Graph, weight: QuantizedWeight, outputs: tuple[int, ...]) -> list[ir.Value]:
    """Constants of one matrix, or of the matrices of experts one below the other: tiles int32 [(E,) N/16, K/64, 128].

    Scales float16 [(E,) N/16, G, 16] and, if the scheme has any, zero points int32 [.., 4] follow. outputs: [(E,) N].
    """
    weight = dataclasses.replace(weight, scheme=dataclasses.replace(weight.scheme, scale_dtype="float16"))
    *leading, width = outputs
    tile_rows, count = -(-width // TILE_OUTPUTS), weight.num_groups

    def packed() -> np.ndarray:
        return _words(tiles(weight.unsigned().reshape(*outputs, -1)))

    def scales() -> np.ndarray:
        return groups(weight.scales().reshape(*outputs, -1))

    def zeros() -> np.ndarray:
        found = weight.zero_points()
        if found is None:
            raise ValueError(f"'{weight.name}' is symmetric")
        return _words(groups(found.reshape(*outputs, -1)))

    steps = -(-weight.num_inputs // TILE_INPUTS)
    parts = [
        (PACKED, ir.DataType.INT32, (*leading, tile_rows, steps, TILE_BYTES // 4), packed),
        ("scales", ir.DataType.FLOAT16, (*leading, tile_rows, count, TILE_OUTPUTS), scales),
    ]
    if not weight.scheme.symmetric:
        parts.append(("zero_points", ir.DataType.INT32, (*leading, tile_rows, count, TILE_OUTPUTS // 4), zeros))
    return [lazy_weight(graph, f"{weight.name}.{suffix}", dtype, shape, make) for suffix, dtype, shape, make in parts]


def int4_fields(weight: QuantizedWeight) -> dict[str, int]:
    """Fields of the node that reads them."""
    return {"block_size": weight.group_size, "has_zero_points": int(not weight.scheme.symmetric)}


def _words(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.uint8).view("<i4")


def _padded(values: np.ndarray, rows: int, columns: int, filler: int) -> np.ndarray:
    missing = (-values.shape[-2] % rows, -values.shape[-1] % columns)
    if not any(missing):
        return values
    widths = [(0, 0)] * (values.ndim - 2) + [(0, missing[0]), (0, missing[1])]
    return np.pad(values, widths, constant_values=filler)
