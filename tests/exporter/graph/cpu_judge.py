"""What a node of the CPU library must give, as plugins/README.md documents its rounding, and how far off it may be.

Nothing here is a guess: a bound is what the rounding of float32 operations can add up to, and a value of x that lies so
near to the middle between two integers that float32 may round it either way counts with a whole step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sinkexport.graph.cpu_nodes import BITS_OF_EXPERTS, BITS_OF_LINEARS, BITS_OF_ROWS

from tests.exporter.graph.cpu_evaluator import Sums, expert_linear, linear, rows_of_table
from tests.exporter.graph.shown_bundle import Shown
from tests.plugins.cpu.linear_cases import quantised

ULP = 2.0**-24
"""Relative error of one float32 operation."""
NORM = 2.0**-20
"""Relative error of a normed value of x in float32: sums of squares, a root, a division, two multiplications."""
FUNCTION = 2.0**-20
"""Relative error of an activation in float32: exp and erf by polynomials."""


def judged(node: Shown) -> float:
    """The largest error of a node's result as a share of what it may be: at most 1 where the node is right.

    The result must be finite. Rows of a chunk without a token are not looked at.
    """
    node = of_tokens(node)
    want, off = expected(node)
    got = node.outputs[0].reshape(want.shape).astype(np.float64)
    assert np.isfinite(got).all(), node.name
    return float((np.abs(got - want) / off).max())


def of_tokens(node: Shown) -> Shown:
    """The same node without rows of a chunk that have no token."""
    if not (count := node.fields.get("num_tokens")):
        return node
    *inputs, num_valid = node.inputs
    constants = 1 + (node.kind in BITS_OF_EXPERTS)  # x, and picks, come before the weights
    per_token = [True] * constants + [False] * (len(inputs) - constants)
    per_token[len(inputs) - node.fields["has_residual"] :] = [True] * node.fields["has_residual"]
    if node.fields.get("has_pick_weights"):
        per_token[len(inputs) - node.fields["has_residual"] - 1] = True

    def cut(values: np.ndarray) -> np.ndarray:
        tokens: np.ndarray = values.reshape(count, -1, values.shape[-1])[: int(num_valid[0])]
        return tokens.reshape(-1, values.shape[-1])

    return node._replace(
        inputs=[cut(one) if cuts else one for one, cuts in zip(inputs, per_token, strict=True)],
        outputs=[cut(node.outputs[0])],
        fields={**node.fields, "num_tokens": 0},
    )


def expected(node: Shown) -> Sums:
    """Result of a matmul or of a table in float64, and how far off each number may be, > 0."""
    fields, x, rest = node.fields, node.inputs[0], node.inputs[1:]
    if node.kind in BITS_OF_ROWS:
        want = rows_of_table(x, list(rest), fields, BITS_OF_ROWS[node.kind])
        off = np.zeros_like(want)
    elif node.kind in BITS_OF_LINEARS:
        want, off = linear(x, list(rest), fields, BITS_OF_LINEARS[node.kind], _matmul(node.kind))
    else:
        bits = BITS_OF_EXPERTS[node.kind]
        want, off = expert_linear(x, rest[0], list(rest[1:]), fields, bits, _matmul(node.kind))
    # What follows the sums: activation, gate, multiplier, a norm, and the residual, whose size may be another.
    residual = np.abs(node.inputs[-1]).max() if fields.get("has_residual") else 0.0
    return want, off + FUNCTION * (np.abs(want) + residual) + 1e-30


def _matmul(kind: str) -> Any:
    return rounding if kind.startswith(("Int8", "Int4")) else in_float32


def in_float32(x: np.ndarray, matrix: np.ndarray, fields: dict[str, Any]) -> Sums:
    """x float64 [.., K] by [N, K]; sums in float32, in any order."""
    return x @ matrix.T, (NORM + ULP * (matrix.shape[1] + 2)) * (np.abs(x) @ np.abs(matrix.T))


def rounding(x: np.ndarray, matrix: np.ndarray, fields: dict[str, Any]) -> Sums:
    """x float64 [.., K], rounded to int8 by groups, by [N, K]: exact sums of a group, scaled and added in float32."""
    rows = x.reshape(-1, x.shape[-1]).astype(np.float32)
    whole, scales, group = quantised(rows, fields["block_size"])
    steps = np.repeat(scales.astype(np.float64), group, axis=1)[:, : rows.shape[1]]
    values = whole * steps
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = np.where(steps > 0, rows / steps, 0.0)
    # Where a norm is part of the node, x is known to within the rounding of the norm alone.
    known = (NORM if fields["norm"] else 0.0) * np.abs(exact)
    either_way = (np.abs(np.abs(exact - np.trunc(exact)) - 0.5) <= known + 4 * ULP * np.abs(exact)) * steps
    slack = NORM + ULP * (scales.shape[1] + 4)
    off = slack * (np.abs(values) @ np.abs(matrix.T)) + either_way @ np.abs(matrix.T)
    shape = (*x.shape[:-1], matrix.shape[0])
    return (values @ matrix.T).reshape(shape), off.reshape(shape)
