"""RMS norms of each query's and key's head before the rotation, by the CPU library's SinkAttention (Qwen3, Gemma 3)."""

from __future__ import annotations

import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.cpu_nodes import is_cpu_node
from sinkexport.graph.edit import drop_unused, is_weight, known_shape, operand, replace_node, typed
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.operators import SINK_ATTENTION, Input
from sinkexport.graph.rms_norms import RowNorm, row_norm


class FuseCpuHeadNorms(GraphPass):
    """A SinkAttention whose queries and keys are both normalised does it itself, if both add the same epsilon.

    Between norm and attention there may be a view: heads are moved before tokens.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Give each such node what is before the norms."""
        graph, modified = model.graph, False
        for node in list(graph):
            if node.op_type == SINK_ATTENTION and is_cpu_node(node) and _fuse(graph, node):
                modified = True
        if modified:
            drop_unused(graph)
        return ir.passes.PassResult(model, modified)


def _fuse(graph: ir.Graph, node: ir.Node) -> bool:
    if node.attributes["packed_width"].as_int() or node.attributes["has_qk_norm"].as_int():
        return False
    of_queries, of_keys = (_norm_before(operand(node, i)) for i in (Input.Q, Input.K))
    if of_queries is None or of_keys is None or of_queries[0].epsilon != of_keys[0].epsilon:
        return False
    b, both = Builder(graph), (of_queries, of_keys)
    heads = [_viewed(b, norm.x, view) for norm, view in both]
    attributes = {
        **node.attributes,
        "has_qk_norm": ir.AttrInt64("has_qk_norm", 1),
        "qk_norm_epsilon": ir.AttrFloat32("qk_norm_epsilon", of_queries[0].epsilon),
    }
    inputs = [*heads, *node.inputs[2:], *(norm.scale for norm, _ in both)]
    fused = ir.node(SINK_ATTENTION, inputs, attributes, domain=node.domain, num_outputs=len(node.outputs))
    for new, old in zip(fused.outputs, node.outputs, strict=True):
        typed(new, known_shape(old), old.dtype)
    replace_node(node, [*b.nodes, fused], fused.outputs)
    return True


def _norm_before(heads: ir.Value) -> tuple[RowNorm, ir.Node | None] | None:
    """The norm of every head of [B, H, T, D], and the view of its result that comes next if there is one."""
    node, size = heads.producer(), known_shape(heads)[-1]
    view = None
    if node is not None and not node.domain and node.op_type in ("Reshape", "Transpose"):
        keeps_rows = node.op_type == "Reshape" or node.attributes["perm"].as_ints()[-1] == 3
        view, node = node, operand(node, 0).producer()
        if not keeps_rows:
            return None
    norm = row_norm(node)
    if norm is None or known_shape(norm.x)[-1] != size or not is_weight(norm.scale):
        return None
    return norm, view


def _viewed(b: Builder, x: ir.Value, view: ir.Node | None) -> ir.Value:
    """The view of what the norm reads. Two views of one token's heads are one."""
    if view is None:
        return x
    shape = known_shape(view.outputs[0])
    if view.op_type == "Transpose":
        return b.op("Transpose", [x], shape, perm=list(view.attributes["perm"].as_ints()))
    before = x.producer()
    is_view = before is not None and before.op_type == "Reshape" and not before.domain
    return b.reshape(operand(before, 0) if is_view else x, shape)  # type: ignore[arg-type]
