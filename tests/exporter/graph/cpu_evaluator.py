"""Nodes of the CPU library in NumPy, for ONNX's reference evaluator: matmuls, rows of tables, chosen experts.

Packed weights are unpacked by the definition in plugins/cpu/kernels/linear.h.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference.op_run import OpRun
from sinkexport.graph.cpu_nodes import LAYER_NORM
from sinkexport.graph.operators import DOMAIN
from sinkexport.util.node_fields import FIELDS, read_fields

from tests.reference.layers import rms_norm

TILE = 16


def unpacked(weights: list[Any], bits: int, rows: int, depth: int, block: int) -> np.ndarray:
    """float64 [.., rows, K]: packed bytes, then scales [.., tiles, groups, 16] and zero points."""
    packed, *groups = weights
    if bits == 32:
        tiles = packed.view(np.float32).reshape(-1, depth, TILE).swapaxes(1, 2)
        return tiles.reshape(-1, TILE * -(-rows // TILE), depth)[:, :rows].astype(np.float64)
    padded = -(-depth // (block or 4)) * (block or 4)
    if bits == 8:
        tiles = packed.view(np.int8).reshape(-1, padded // 4, TILE, 4).transpose(0, 2, 1, 3)
    else:
        fours = packed.reshape(-1, padded // 8, TILE, 4)
        tiles = np.stack([fours & 15, fours >> 4], axis=3).transpose(0, 2, 1, 3, 4)
    codes = tiles.reshape(-1, TILE * -(-rows // TILE), padded).astype(np.float64)
    each = [np.repeat(_by_row(one, codes.shape[1]), block or padded, axis=2) for one in groups]
    zero = each[1] if len(each) > 1 else (8.0 if bits == 4 else 0.0)
    return ((codes - zero) * each[0])[:, :rows, :depth]


def _by_row(groups: np.ndarray, rows: int) -> np.ndarray:
    """[.., tiles, groups, 16] -> [E, rows, groups]."""
    by_tile = groups.reshape(-1, *groups.shape[-2:]).swapaxes(1, 2)
    return by_tile.reshape(-1, rows, groups.shape[-2]).astype(np.float64)


def activated(x: np.ndarray, activation: str) -> np.ndarray:
    """An activation by its name in a node."""
    if activation == "silu":
        return x / (1 + np.exp(-x))
    if activation == "gelu":
        return x * np.vectorize(math.erfc, otypes=[float])(-x / math.sqrt(2)) / 2
    if activation == "gelu_tanh":
        return x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return np.square(np.maximum(x, 0)) if activation == "relu2" else x


def only_valid(y: np.ndarray, num_valid: Any, *, num_tokens: int, repeats_last: int, **_: Any) -> np.ndarray:
    """Rows of tokens that count; the others are copies of the last of them, or hold no numbers."""
    rows = y.reshape(-1, y.shape[-1]).copy()
    valid = len(rows) // num_tokens * int(num_valid[0])
    rows[valid:] = rows[valid - 1] if repeats_last else np.nan
    return rows.reshape(y.shape)


class _Node(OpRun):
    op_domain = DOMAIN
    bits = 32

    def _run(self, *inputs: Any, **attributes: Any) -> tuple[Any]:
        packed = attributes.pop(FIELDS, None)
        node = ir.node(self.op_type, [], {} if packed is None else {FIELDS: packed})
        return self._compute(*inputs, **attributes, **read_fields(node))

    def _compute(self, *inputs: Any, **fields: Any) -> tuple[Any]:
        raise NotImplementedError

    def _weights(self, inputs: list[Any], rows: int, depth: int, fields: dict[str, Any]) -> np.ndarray:
        """The matrices of the first inputs, which are taken away."""
        assert fields["layout"] == "n16"
        count = 1 + (self.bits < 32) + fields["has_zero_points"]
        weights = [inputs.pop(0) for _ in range(count)]
        return unpacked(weights, self.bits, rows, depth, fields["block_size"])


class FloatLinear(_Node):
    def _compute(self, x: Any, *inputs: Any, **fields: Any) -> tuple[Any]:
        left, depth, width = list(inputs), fields["in_features"], fields["out_features"]
        assert x.dtype == np.float32
        assert x.shape[-1] == depth
        parts = 2 if fields["gated"] else 1
        tiled = parts * TILE * -(-width // TILE)
        (matrix,) = self._weights(left, tiled if parts == 2 else width, depth, fields)
        if parts == 2:  # gates and ups in turns of 16
            matrix = matrix.reshape(-1, 2, TILE, depth).swapaxes(0, 1).reshape(2, -1, depth)[:, :width]
            matrix = matrix.reshape(2 * width, depth)
        x = x.astype(np.float64)
        if fields["norm"]:
            x = x - x.mean(axis=-1, keepdims=True) if fields["norm"] == LAYER_NORM else x
            x = rms_norm(x, left.pop(0), fields["norm_epsilon"])
        x = x + (left.pop(0) if fields["has_norm_bias"] else 0.0)
        y = x @ matrix.T + (left.pop(0) if fields["has_bias"] else 0.0)
        y = activated(y[..., :width], fields["activation"]) * (y[..., width:] if parts == 2 else 1.0)
        y = y * fields["multiplier"]
        y = rms_norm(y, left.pop(0), fields["output_norm_epsilon"]) if fields["output_norm"] else y
        y = y + (left.pop(0) if fields["has_residual"] else 0.0)
        y = y if not fields["num_tokens"] else only_valid(y, left.pop(0), **fields)
        assert not left
        return (y.astype(np.float32),)


class FloatRows(_Node):
    def _compute(self, ids: Any, *inputs: Any, **fields: Any) -> tuple[Any]:
        (table,) = self._weights(list(inputs), fields["num_rows"], fields["row_length"], fields)
        return (table[ids].astype(np.float32),)


class FloatExpertLinear(_Node):
    def _compute(self, x: Any, picks: Any, *inputs: Any, **fields: Any) -> tuple[Any]:
        left, depth, width = list(inputs), fields["in_features"], fields["out_features"]
        parts = 2 if fields["gated"] else 1
        tiled = parts * TILE * -(-width // TILE)
        matrices = self._weights(left, tiled if parts == 2 else width, depth, fields)
        assert len(matrices) == fields["num_experts"]
        if parts == 2:
            matrices = matrices.reshape(len(matrices), -1, 2, TILE, depth).swapaxes(1, 2)
            matrices = matrices.reshape(len(matrices), 2, -1, depth)[:, :, :width].reshape(-1, 2 * width, depth)
        x, chosen = x.reshape(-1, depth).astype(np.float64), picks.reshape(-1)
        x = rms_norm(x, left.pop(0), fields["norm_epsilon"]) if fields["norm"] else x
        rows = np.repeat(x, len(chosen) // len(x), axis=0)
        y = np.stack([matrices[p] @ row for p, row in zip(chosen, rows, strict=True)])
        y = y + (left.pop(0)[chosen] if fields["has_bias"] else 0.0)
        if fields["activation"] == "clamped_swiglu":
            limit = fields["activation_limit"]
            gate = np.minimum(y[:, :width], limit)
            y = gate / (1 + np.exp(-1.702 * gate)) * (np.clip(y[:, width:], -limit, limit) + 1)
        else:
            y = activated(y[:, :width], fields["activation"]) * (y[:, width:] if parts == 2 else 1.0)
        y, shape = y * fields["multiplier"], (*picks.shape, width)
        if fields["has_pick_weights"]:
            weights = left.pop(0)
            y = (y.reshape(-1, weights.shape[-1], width) * weights.reshape(-1, weights.shape[-1], 1)).sum(axis=1)
            shape = (*weights.shape[:-1], width)
        y = y.reshape(left[0].shape) + left.pop(0) if fields["has_residual"] else y.reshape(shape)
        if fields["num_tokens"]:
            y = only_valid(y, left.pop(0), **fields)
        assert not left
        return (y.astype(np.float32),)


def _narrower(parent: type[_Node], name: str, bits: int) -> type[_Node]:
    return type(name, (parent,), {"bits": bits, "__module__": __name__})


CPU_NODES = [
    FloatLinear,
    FloatRows,
    FloatExpertLinear,
    _narrower(FloatLinear, "Int8Linear", 8),
    _narrower(FloatLinear, "Int4Linear", 4),
    _narrower(FloatRows, "Int8Rows", 8),
    _narrower(FloatRows, "Int4Rows", 4),
    _narrower(FloatExpertLinear, "Int8ExpertLinear", 8),
]
