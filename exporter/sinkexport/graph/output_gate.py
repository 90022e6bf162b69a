"""Gated attention (arXiv:2505.06708): find the Mul by a sigmoid that follows attention, and let attention do it."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape, only_user

BY_TOKEN = (0, 2, 1, 3)
"""[B, Hq, T, D] -> [B, T, Hq, D]."""


@dataclasses.dataclass(frozen=True)
class OutputGate:
    """``multiplied = ungated * sigmoid(gate)``, where `ungated` is an attention's output in the order of tokens.

    ungated: [B, T, Hq, D] or [B, T, Hq * D]. gate: the same shape, or [B, T, Hq, 1], of the same type.
    """

    gate: ir.Value
    ungated: ir.Value
    multiplied: ir.Node


def find_output_gate(attention: ir.Node) -> OutputGate | None:
    """The gate of an attention's first output [B, Hq, T, D]; None: nothing but views lies before another operator.

    The graph must have no nodes without use.
    """
    value = attention.outputs[0]
    batch, heads, tokens, head_dim = known_shape(value)
    split, joined = (batch, tokens, heads, head_dim), (batch, tokens, heads * head_dim)
    is_by_token = 1 in (heads, tokens)  # the transposition is a Reshape then
    while (node := only_user(value)) is not None:  # were there others, the gate might be computed from the attention
        if node.op_type == "Transpose" and not is_by_token and tuple(node.attributes["perm"].as_ints()) == BY_TOKEN:
            is_by_token = True
        elif node.op_type == "Mul":
            return _gate(value, node, split) if is_by_token else None
        elif node.op_type != "Reshape" or not is_by_token or known_shape(node.outputs[0]) not in (split, joined):
            return None
        value = node.outputs[0]
    return None


def absorb(b: Builder, found: OutputGate, num_q_heads: int) -> ir.Value:
    """Take the Mul out of the graph: what read it now reads the attention. Returns the gate, [B, Hq, T, D or 1]."""
    ir.convenience.replace_all_uses_with(found.multiplied.outputs[0], found.ungated, replace_graph_outputs=True)
    b.graph.remove(found.multiplied, safe=True)
    batch, tokens, *_ = shape = known_shape(found.gate)
    if len(shape) == 3:
        shape = (batch, tokens, num_q_heads, shape[2] // num_q_heads)
    rows = b.reshape(found.gate, shape)  # [B, T, Hq, D or 1]
    return b.op("Transpose", [rows], (batch, num_q_heads, tokens, shape[3]), perm=BY_TOKEN)


def _gate(value: ir.Value, multiplied: ir.Node, split: tuple[int, ...]) -> OutputGate | None:
    factor = multiplied.inputs[1] if multiplied.inputs[0] is value else multiplied.inputs[0]
    sigmoid = None if factor is None else factor.producer()
    if sigmoid is None or sigmoid.op_type != "Sigmoid" or sigmoid.domain or sigmoid.inputs[0] is None:
        return None
    gate, shape = sigmoid.inputs[0], known_shape(value)
    if known_shape(gate) != shape and (shape != split or known_shape(gate) != (*split[:3], 1)):
        return None
    return OutputGate(gate, value, multiplied) if gate.dtype == value.dtype else None
