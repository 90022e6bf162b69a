"""Attention in standard operators (opset 24): SinkAttention, BlockAttention and the angles of their rotations."""

from __future__ import annotations

import onnx_ir as ir

from sinkexport.graph.attention.angles import expand_angles
from sinkexport.graph.attention.block import BlockAttention
from sinkexport.graph.attention.chunk import ChunkAttention
from sinkexport.graph.attention.int8_chunk import Int8ChunkAttention
from sinkexport.graph.attention.int8_step import Int8StepAttention
from sinkexport.graph.attention.parts import AttentionParts, PerRun
from sinkexport.graph.attention.step import StepAttention
from sinkexport.graph.attention.verify import Int8VerifyAttention, VerifyAttention
from sinkexport.graph.cpu_nodes import is_cpu_node
from sinkexport.graph.edit import known_shape, operand
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.operators import BLOCK_ATTENTION, DOMAIN, SINK_ATTENTION, STREAM_ANGLES, Input


class ExpandAttention(GraphPass):
    """Replace every node of domain ``ai.sinkexport`` by standard operators, those that the target takes.

    Nodes of the CPU library stay.

    Attention over one token and over a chunk have forms of their own: one is bound by memory, the other by arithmetic.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Expand each node, sharing between layers what depends on positions alone.

        Raises: ValueError naming an operator of that domain that is none of attention's.
        """
        graph = model.graph
        nodes = [node for node in graph if node.domain == DOMAIN and not is_cpu_node(node)]
        per_run = PerRun(graph)
        for node in nodes:
            if node.op_type == STREAM_ANGLES:
                expand_angles(graph, node)
            elif node.op_type in (SINK_ATTENTION, BLOCK_ATTENTION):
                has_circular_scatter = self.context.target.has_circular_scatter
                form = _form(node, verifies=self.context.verifies)
                form(graph, node, per_run, has_circular_scatter=has_circular_scatter).expand()
            else:
                raise ValueError(f"unknown operator {node.domain}::{node.op_type}")
        if not any(node.domain == DOMAIN for node in graph):
            model.opset_imports.pop(DOMAIN, None)
        return ir.passes.PassResult(model, bool(nodes))


def _form(node: ir.Node, *, verifies: bool) -> type[AttentionParts]:
    if node.op_type == BLOCK_ATTENTION:
        return BlockAttention
    one_token = known_shape(operand(node, Input.Q))[2] == 1
    is_int8 = operand(node, Input.WINDOW_K).dtype == ir.DataType.INT8
    if verifies:
        return Int8VerifyAttention if is_int8 else VerifyAttention
    step, chunk = (Int8StepAttention, Int8ChunkAttention) if is_int8 else (StepAttention, ChunkAttention)
    return step if one_token else chunk
