"""Chunks of fewer tokens than the prefill graph takes: matmuls of the CPU library leave out rows without a token."""

from __future__ import annotations

import onnx_ir as ir

from sinkexport.graph.cpu_nodes import BITS_OF_EXPERTS, BITS_OF_LINEARS, is_cpu_node
from sinkexport.graph.edit import known_shape, operand
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.operators import SINK_ATTENTION

NUM_TOKENS, REPEATS_LAST = "num_tokens", "repeats_last"


class SkipCpuPadding(GraphPass):
    """Give matmuls whose rows are the chunk's tokens the input ``num_valid``, and ``num_tokens`` = T as a field.

    Rows are tokens where the first axis of x that is not 1 has T entries. A node that had them by chance would compute
    other logits for a part of a chunk, which the check of an export compares with the model's.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change every such node."""
        graph, modified = model.graph, False
        num_tokens = known_shape(graph.inputs[0])[-1]
        num_valid = graph.inputs[-1]
        if num_tokens == 1 or num_valid.dtype != ir.DataType.INT64 or known_shape(num_valid) != (1,):
            return ir.passes.PassResult(model, False)
        skipping = [node for node in filter(is_cpu_node, graph) if _has_rows_of_tokens(node, num_tokens)]
        for node in skipping:
            node.resize_inputs(len(node.inputs) + 1)
            node.replace_input_with(len(node.inputs) - 1, num_valid)
            node.attributes[NUM_TOKENS] = ir.AttrInt64(NUM_TOKENS, num_tokens)
            modified = True
        for node in skipping:
            result = node.outputs[0]
            is_read_whole = result.is_graph_output() or not all(_leaves_out(use.node) for use in result.uses())
            node.attributes[REPEATS_LAST] = ir.AttrInt64(REPEATS_LAST, int(is_read_whole))
        return ir.passes.PassResult(model, modified)


def _has_rows_of_tokens(node: ir.Node, num_tokens: int) -> bool:
    if node.op_type not in {*BITS_OF_LINEARS, *BITS_OF_EXPERTS} or node.attributes[NUM_TOKENS].as_int():
        return False
    return [size for size in known_shape(operand(node, 0))[:-1] if size != 1][:1] == [num_tokens]


def _leaves_out(node: ir.Node) -> bool:
    """Whether a node reads no rows of tokens that do not count."""
    if not is_cpu_node(node):
        return False
    if node.op_type == SINK_ATTENTION:
        return bool(node.attributes["has_num_valid"].as_int())
    return NUM_TOKENS in node.attributes and bool(node.attributes[NUM_TOKENS].as_int())
