"""StreamAngles in standard operators: exact angles of positions of any size, by arithmetic of 64 bits."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from sinkrt.ring import TURN

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape, operand, replace_node


def expand_angles(graph: ir.Graph, node: ir.Node) -> None:
    """Expand one node: cos and sin [B, T, R/2] of ``max(0, t - behind) * f`` turns (model.attention.stream_angles)."""
    position, frequency = operand(node, 0), operand(node, 1)
    (batch,) = known_shape(position)
    num_tokens, behind = (node.attributes[name].as_int() for name in ("num_tokens", "behind"))
    b = Builder(graph)
    t = b.reshape(position, (batch, 1))
    # Token i is `i - behind` tokens from the first: one constant for both.
    if num_tokens > 1 or behind:
        t = b.op("Add", [t, b.ints(np.arange(num_tokens)[None, :] - behind, "from_first")])  # [B, T]
    if behind:
        t = b.op("Max", [t, b.ints(0, "zero")])
    t = b.reshape(t, (batch, num_tokens, 1))
    half_word, turn = b.ints(2**16, "half_word"), b.ints(TURN, "turn")
    high = b.op("Div", [t, half_word])  # t >= 0, so truncation is floor
    low = b.op("Sub", [t, b.op("Mul", [high, half_word])])
    high_part = b.op("Mul", [b.op("Mod", [b.op("Mul", [high, frequency]), turn]), half_word])
    phase = b.op("Add", [high_part, b.op("Mul", [low, frequency])])  # [B, T, R/2]
    centred = b.op(
        "Sub",
        [b.op("Mod", [b.op("Add", [phase, b.ints(TURN // 2, "half_turn")]), turn]), b.ints(TURN // 2, "half_turn")],
    )
    angle = b.cast(centred, ir.DataType.FLOAT)
    angle = b.op("Mul", [angle, b.scalar(2 * math.pi / TURN, ir.DataType.FLOAT)])
    replace_node(node, b.nodes, [b.op("Cos", [angle]), b.op("Sin", [angle])])
