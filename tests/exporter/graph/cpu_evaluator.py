"""Nodes of the CPU library in NumPy, for ONNX's reference evaluator: matmuls, rows of tables, chosen experts.

Packed weights are unpacked by the definition in plugins/cpu/kernels/linear.h. `linear` and `expert_linear` carry along
how far a sum may be off, for who compares a kernel's results with them (cpu_judge.py).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun
from sinkexport.graph.cpu_nodes import LAYER_NORM
from sinkexport.graph.operators import DOMAIN

from tests.reference.layers import rms_norm

TILE = 16
Sums = tuple[np.ndarray, np.ndarray]
"""Numbers, and how far each may be off; both float64 of one shape."""
Matmul = Callable[[np.ndarray, np.ndarray, dict[str, Any]], Sums]
"""Function of x float64 [.., K], matrix float64 [N, K], and the node's fields."""
STEEPEST = 1.13
"""The most that silu, both gelu and their like change by for a change of 1."""


def unpacked(weights: list[Any], bits: int, rows: int, depth: int, block: int) -> np.ndarray:
    """float64 [.., rows, K]: packed bytes, then scales [.., tiles, groups, 16] and zero points."""
    packed, *groups = weights
    if bits == 32:
        tiles = packed.view(np.float32).reshape(-1, depth, TILE).swapaxes(1, 2)
        return tiles.reshape(-1, TILE * -(-rows // TILE), depth)[:, :rows].astype(np.float64)
    if bits == 16:
        pairs = packed.view(np.uint16).reshape(-1, -(-depth // 2), TILE, 2).transpose(0, 2, 1, 3)
        values = (pairs.astype(np.uint32) << 16).view(np.float32)
        return values.reshape(-1, TILE * -(-rows // TILE), pairs.shape[2] * 2)[:, :rows, :depth].astype(np.float64)
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
        with np.errstate(over="ignore"):  # far below zero, where the result is 0
            return x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return np.square(np.maximum(x, 0)) if activation == "relu2" else x


def only_valid(y: np.ndarray, num_valid: Any, *, num_tokens: int, repeats_last: int, **_: Any) -> np.ndarray:
    """Rows of tokens that count; the others are copies of the last of them, or hold no numbers."""
    rows = y.reshape(-1, y.shape[-1]).copy()
    valid = len(rows) // num_tokens * int(num_valid[0])
    rows[valid:] = rows[valid - 1] if repeats_last else np.nan
    return rows.reshape(y.shape)


def exact(x: np.ndarray, matrix: np.ndarray, _: dict[str, Any]) -> Sums:
    """The matmul in float64."""
    y = x @ matrix.T
    return y, np.zeros_like(y)


def linear(x: np.ndarray, inputs: list[Any], fields: dict[str, Any], bits: int, matmul: Matmul = exact) -> Sums:
    """What a linear gives for x float32 [.., K]. inputs: all others. Rows without a token: see `only_valid`."""
    left, depth, width = list(inputs), fields["in_features"], fields["out_features"]
    assert x.dtype == np.float32
    assert x.shape[-1] == depth
    (matrix,) = node_weights(left, fields, bits)
    x = x.astype(np.float64)
    if fields["norm"]:
        x = x - x.mean(axis=-1, keepdims=True) if fields["norm"] == LAYER_NORM else x
        x = rms_norm(x, left.pop(0), fields["norm_epsilon"])
    x = x + (left.pop(0) if fields["has_norm_bias"] else 0.0)
    y, off = matmul(x, matrix, fields)
    y, off = _activated((y + (left.pop(0) if fields["has_bias"] else 0.0), off), width, fields)
    if fields["output_norm"]:
        weight, epsilon = left.pop(0), fields["output_norm_epsilon"]
        size = np.sqrt(np.square(y).mean(axis=-1, keepdims=True) + epsilon)
        off = np.abs(weight) * (off + np.abs(y) * np.sqrt(np.square(off).mean(axis=-1, keepdims=True)) / size) / size
        y = rms_norm(y, weight, epsilon)
    y = y + (left.pop(0) if fields["has_residual"] else 0.0)
    y = y if not fields["num_tokens"] else only_valid(y, left.pop(0), **fields)
    assert not left
    return y, off


def expert_linear(
    x: np.ndarray, picks: np.ndarray, inputs: list[Any], fields: dict[str, Any], bits: int, matmul: Matmul = exact
) -> Sums:
    """What a matmul by chosen matrices gives for rows x float32 [.., K] and picks int64 [..]. inputs: all others."""
    left, depth, width = list(inputs), fields["in_features"], fields["out_features"]
    matrices = node_weights(left, fields, bits)
    assert len(matrices) == fields["num_experts"]
    x, chosen = x.reshape(-1, depth).astype(np.float64), np.clip(picks.reshape(-1), 0, len(matrices) - 1)
    x = rms_norm(x, left.pop(0), fields["norm_epsilon"]) if fields["norm"] else x
    rows = np.repeat(x, len(chosen) // len(x), axis=0)
    y = np.zeros((len(chosen), matrices.shape[1]))
    off = np.zeros_like(y)
    for expert in np.unique(chosen):
        y[chosen == expert], off[chosen == expert] = matmul(rows[chosen == expert], matrices[expert], fields)
    y, off = _activated((y + (left.pop(0)[chosen] if fields["has_bias"] else 0.0), off), width, fields)
    shape = (*picks.shape, width)
    if fields["has_pick_weights"]:
        weights = left.pop(0)
        each = weights.reshape(-1, weights.shape[-1], 1)
        y = (y.reshape(-1, weights.shape[-1], width) * each).sum(axis=1)
        off = (off.reshape(-1, weights.shape[-1], width) * np.abs(each)).sum(axis=1)
        shape = (*weights.shape[:-1], width)
    y = y.reshape(left[0].shape) + left.pop(0) if fields["has_residual"] else y.reshape(shape)
    y = y if not fields["num_tokens"] else only_valid(y, left.pop(0), **fields)
    assert not left
    return y, off.reshape(y.shape)


def node_weights(inputs: list[Any], fields: dict[str, Any], bits: int) -> np.ndarray:
    """float64 [E or 1, N, K], gated [.., 2N, K], gates first. Takes what they are packed in away from the inputs."""
    assert fields["layout"] == "n16"
    weights = [inputs.pop(0) for _ in range(1 + (bits < 16) + fields["has_zero_points"])]
    depth, width = fields["in_features"], fields["out_features"]
    if not fields["gated"]:
        return unpacked(weights, bits, width, depth, fields["block_size"])
    tiled = unpacked(weights, bits, 2 * TILE * -(-width // TILE), depth, fields["block_size"])
    parts = tiled.reshape(len(tiled), -1, 2, TILE, depth).swapaxes(1, 2)  # gates and ups in turns of 16
    return parts.reshape(len(tiled), 2, -1, depth)[:, :, :width].reshape(-1, 2 * width, depth)


def _activated(sums: Sums, width: int, fields: dict[str, Any]) -> Sums:
    """Activation, gate and multiplier of sums [.., N] or gated [.., 2N]."""
    (y, off), activation = sums, fields["activation"]
    gate, gate_off = y[..., :width], off[..., :width]
    up, up_off = (y[..., width:], off[..., width:]) if fields["gated"] else (np.ones(1), np.zeros(1))
    if activation == "clamped_swiglu":
        limit = fields["activation_limit"]
        gate = np.minimum(gate, limit)
        value, up = gate / (1 + np.exp(-1.702 * gate)), np.clip(up, -limit, limit) + 1
    else:
        value = activated(gate, activation)
    steepest = 2 * (np.abs(gate) + gate_off) if activation == "relu2" else STEEPEST if activation != "none" else 1.0
    value_off = steepest * gate_off
    off = value_off * (np.abs(up) + up_off) + np.abs(value) * up_off
    return value * up * fields["multiplier"], off * abs(fields["multiplier"])


def all_fields(attributes: dict[str, Any]) -> dict[str, Any]:
    """Fields of a node by name: its attributes, or ``name=value`` of them all in the attribute ``fields``."""
    found = {name: one.decode() if isinstance(one, bytes) else one for name, one in attributes.items()}
    pairs = (pair.split("=", 1) for pair in found.pop("fields", "").split(",") if "=" in pair)
    return found | {name: _parsed(text) for name, text in pairs}


def _parsed(text: str) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


class _Node(OpRun):
    op_domain = DOMAIN
    bits = 32

    def _run(self, *inputs: Any, **attributes: Any) -> tuple[Any]:
        return (self.computed(list(inputs), all_fields(attributes)).astype(np.float32),)

    def computed(self, inputs: list[Any], fields: dict[str, Any]) -> np.ndarray:
        raise NotImplementedError


class FloatLinear(_Node):
    def computed(self, inputs: list[Any], fields: dict[str, Any]) -> np.ndarray:
        return linear(inputs[0], inputs[1:], fields, self.bits)[0]


class FloatRows(_Node):
    def computed(self, inputs: list[Any], fields: dict[str, Any]) -> np.ndarray:
        return rows_of_table(inputs[0], inputs[1:], fields, self.bits)


def rows_of_table(ids: np.ndarray, inputs: list[Any], fields: dict[str, Any], bits: int) -> np.ndarray:
    """Rows of a table, float64 [.., K]."""
    (table,) = unpacked(inputs, bits, fields["num_rows"], fields["row_length"], fields["block_size"])
    found: np.ndarray = table[ids]
    return found


class FloatExpertLinear(_Node):
    def computed(self, inputs: list[Any], fields: dict[str, Any]) -> np.ndarray:
        return expert_linear(inputs[0], inputs[1], inputs[2:], fields, self.bits)[0]


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
