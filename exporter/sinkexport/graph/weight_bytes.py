"""Bytes of weights that one run of a graph has to read."""

from __future__ import annotations

import math

import onnx_ir as ir

from sinkexport.graph.cpu_nodes import BITS_OF_EXPERTS, BITS_OF_ROWS, ExpertLinear, is_cpu_node
from sinkexport.graph.edit import known_shape
from sinkexport.graph.operators import HALF_EXPERT_LINEAR, INT4_EXPERT_LINEAR, INT8_EXPERT_LINEAR

EXPERT_MATMULS = (HALF_EXPERT_LINEAR, INT8_EXPERT_LINEAR, INT4_EXPERT_LINEAR)
"""Nodes of the TensorRT plugin: inputs, matrices (and scales) of all experts, which are chosen."""


def weight_bytes(model: ir.Model) -> int:
    """Count every initializer once that a node reads whole.

    Of an initializer that is only gathered from, the rows count: nothing of an untied embedding. Of the experts of an
    MoE, matrices each, as many count as a run can choose at most. The same holds for matrices and scales that a node of
    the TensorRT plugin or of the CPU library reads where they lie, and for tables whose rows such a node gives.
    """
    read_whole: set[str | None] = set()
    shares: dict[str | None, float] = {}  # by initializer of the CPU library's experts, what can be chosen of it
    gathered: dict[str | None, ir.Value] = {}  # by initializer, what is gathered of it
    chosen: dict[str | None, ir.Value] = {}  # by initializer, the rows that a matmul by chosen experts gives
    for node in model.graph:
        names = [None if value is None else value.name for value in node.inputs]
        if node.op_type == "Gather":
            gathered[names[0]] = node.outputs[0]
            read_whole.update(names[1:])
        elif is_cpu_node(node) and node.op_type in BITS_OF_ROWS:
            read_whole.update(names[:1])
        elif is_cpu_node(node) and node.op_type in BITS_OF_EXPERTS:
            linear = ExpertLinear.of(node)
            of_experts = [value.name for value in (*linear.weights, linear.bias) if value is not None]
            picks = math.prod(known_shape(linear.picks))
            shares |= dict.fromkeys(of_experts, min(1.0, picks / linear.num_experts))
            read_whole.update(set(names) - set(of_experts))
        elif node.op_type in EXPERT_MATMULS:
            chosen |= dict.fromkeys(names[1:-1], node.outputs[0])
            read_whole.update((names[0], names[-1]))
        else:
            read_whole.update(names)
    total = 0
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            continue
        shape, bits = tensor.shape.numpy(), tensor.dtype.bitwidth
        if name in read_whole:
            total += math.prod(shape) * bits // 8
        elif name in shares:
            total += round(shares[name] * math.prod(shape) * bits // 8)
        elif name in chosen or (name in gathered and len(shape) > 2):
            # Of an axis of experts, what as many picks as the result has rows can choose.
            rows = _rows(chosen.get(name) or gathered[name], otherwise=shape[0])
            total += min(rows, shape[0]) * math.prod(shape[1:]) * bits // 8
    return total


def _rows(value: ir.Value, otherwise: int) -> int:
    if value.shape is None or len(value.shape) == 0:
        return otherwise
    first = value.shape[0]
    return first if isinstance(first, int) else 1
