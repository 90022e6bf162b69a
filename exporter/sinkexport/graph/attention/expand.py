"""The portable form: SinkAttention and StreamAngles in standard operators (opset 24)."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from sinkrt.ring import TURN

from sinkexport.graph.attention.block import BlockAttention
from sinkexport.graph.attention.chunk import ChunkAttention
from sinkexport.graph.attention.int8_chunk import Int8ChunkAttention
from sinkexport.graph.attention.int8_step import Int8StepAttention
from sinkexport.graph.attention.parts import PerRun, operand
from sinkexport.graph.attention.step import StepAttention
from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape, replace_node
from sinkexport.graph.operators import BLOCK_ATTENTION, DOMAIN, SINK_ATTENTION, STREAM_ANGLES


def expand_operators(model: ir.Model, target: str = "onnx") -> None:
    """Replace every node of domain ``ai.sinkexport`` by standard operators, those that `target` takes.

    Attention over one token and over a chunk have forms of their own: one is bound by memory, the other by arithmetic.
    """
    graph = model.graph
    per_run = PerRun(graph)
    for node in list(graph):
        if node.domain != DOMAIN:
            continue
        if node.op_type == STREAM_ANGLES:
            _expand_angles(graph, node)
        elif node.op_type == BLOCK_ATTENTION:
            BlockAttention(graph, node, per_run, target).expand()
        elif node.op_type == SINK_ATTENTION:
            one_token = known_shape(operand(node, 0))[2] == 1
            is_int8 = operand(node, 5).dtype == ir.DataType.INT8
            step, chunk = (Int8StepAttention, Int8ChunkAttention) if is_int8 else (StepAttention, ChunkAttention)
            (step if one_token else chunk)(graph, node, per_run, target).expand()
        else:
            raise ValueError(f"unknown operator {node.domain}::{node.op_type}")
    model.opset_imports.pop(DOMAIN, None)


def _expand_angles(graph: ir.Graph, node: ir.Node) -> None:
    """cos and sin [B, T, R/2] of ``max(0, t - behind) * f`` turns; see ``model.attention.stream_angles``."""
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
