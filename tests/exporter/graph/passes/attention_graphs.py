"""Graphs of one traced SinkAttention with its rotations, for tests of the passes that take it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import constant, typed
from sinkexport.graph.operators import DOMAIN, SINK_ATTENTION, STREAM_ANGLES

BATCH, HEADS, KV_HEADS, DIM, SINKS, WINDOW = 1, 4, 2, 64, 2, 6
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
FREQUENCY = np.arange(1, DIM // 2 + 1) * 1000003


def value(name: str, shape: Sequence[int], dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def attention_graph(
    num_tokens: int = 1, *, dtype: ir.DataType = FLOAT, rotated: Sequence[str] = ("q", "k"), with_angles: bool = True
) -> ir.Model:
    """Inputs ids, position, the states, num_valid of a chunk, then q, k, v; outputs out and the next states.

    rotated: which of q and k go through RotaryEmbedding. with_angles: whether its angles are StreamAngles.
    """
    ids, position = value("ids", (BATCH, num_tokens), INT64), value("position", (BATCH,), INT64)
    shapes = {"sink_k": SINKS, "sink_v": SINKS, "window_k": WINDOW, "window_v": WINDOW}
    states = [value(name, (BATCH, KV_HEADS, length, DIM), dtype) for name, length in shapes.items()]
    num_valid = [] if num_tokens == 1 else [value("num_valid", (BATCH,), INT64)]
    heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    tokens = {name: value(name, (BATCH, n, num_tokens, DIM), dtype) for name, n in heads.items()}
    inputs = [ids, position, *states, *num_valid, *tokens.values()]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 24, DOMAIN: 1})
    b = Builder(graph)
    frequency = constant(graph, FREQUENCY.astype(np.int64), "frequency")
    angles = {}
    for name, behind in (("own", 0), ("shift", SINKS + WINDOW - 1)):
        node = ir.node(
            STREAM_ANGLES,
            [position, frequency],
            {"num_tokens": num_tokens, "behind": behind},
            domain=DOMAIN,
            num_outputs=2,
        )
        b.nodes.append(node)
        angles[name] = [b.cast(typed(out, (BATCH, num_tokens, DIM // 2), FLOAT), dtype) for out in node.outputs]
    if not with_angles:
        angles["own"] = [b.op("Cos", [part]) for part in angles["own"]]
    for name in rotated:
        tokens[name] = b.op("RotaryEmbedding", [tokens[name], *angles["own"]], tokens[name].shape, interleaved=0)
    node = ir.node(
        SINK_ATTENTION,
        [*tokens.values(), *states, position, *angles["shift"], *(num_valid or [None]), *[None] * 9],
        {"scale": 0.125, "softcap": 0.0, "interleaved": 0, "act_alpha": 1.0, "act_beta": 1.0, "act_min_queries": 1},
        domain=DOMAIN,
        num_outputs=8,
    )
    b.nodes.append(node)
    for output, like in zip(node.outputs[:5], [tokens["q"], *states], strict=True):
        typed(output, like.shape, like.dtype)
    for node_ in b.nodes:
        graph.append(node_)
    for output, name in zip(node.outputs[:5], ("out", *(f"{state.name}.next" for state in states)), strict=True):
        output.name = name
        graph.outputs.append(output)
    return ir.Model(graph, ir_version=11)


def attention_of(model: ir.Model) -> ir.Node:
    """The only SinkAttention."""
    (node,) = (node for node in model.graph if node.op_type == SINK_ATTENTION)
    return node
