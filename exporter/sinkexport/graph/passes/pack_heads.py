"""Queries, keys and values go to a kernel library's SinkAttention as the matmul that makes them leaves them.

A runtime would copy each of the three parts of a Split. With one token the parts lie as attention reads them anyway;
the CPU library reads several so, too.
"""

from __future__ import annotations

import onnx_ir as ir

from sinkexport.graph.edit import known_shape, only_user, operand, replace_node, split_source, static_shape, typed
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.operators import DOMAIN, SINK_ATTENTION, Input
from sinkexport.graph.output_gate import BY_TOKEN


class PackHeads(GraphPass):
    """Fuse Split -> 3 views -> SinkAttention -> view of graphs with static views.

    The matmul's output is [B, T, (Hq + 2 Hkv) * D], the node's then [B, T, Hq * D]. Whatever lies between (norms of
    queries and keys, casts) is left alone, and so are chunks for TensorRT. Views are Reshapes; of a chunk the heads
    are moved by a Transpose, too.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Pack every node that is not packed yet."""
        nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type == SINK_ATTENTION]
        unpacked = [n for n in nodes if "packed_width" in n.attributes and not n.attributes["packed_width"].as_int()]
        takes_chunks = self.context.target.has_cpu_library
        return ir.passes.PassResult(model, sum(_pack(node, takes_chunks=takes_chunks) for node in unpacked) > 0)


def _pack(node: ir.Node, *, takes_chunks: bool) -> bool:
    batch, num_heads, num_tokens, value_dim = known_shape(node.outputs[0])
    if num_tokens > 1 and (not takes_chunks or node.attributes["has_gate"].as_int()):
        return False
    # A step that only reads states has no keys and values.
    has_queries_alone = num_tokens == 1 and "reads_only" in node.attributes and node.attributes["reads_only"].as_int()
    parts = (Input.Q,) if has_queries_alone else (Input.Q, Input.K, Input.V)
    heads = _whole([operand(node, i) for i in parts], num_tokens)
    wanted = (batch, num_tokens, num_heads * value_dim)
    view = _joining_view(node.outputs[0])
    if heads is None or view is None or static_shape(view.outputs[0]) != wanted:
        return False
    width = num_heads * known_shape(operand(node, Input.Q))[3]
    attributes = {**node.attributes, "packed_width": ir.AttrInt64("packed_width", width)}
    inputs = [heads, *node.inputs[len(parts) :]]
    packed = ir.node(SINK_ATTENTION, inputs, attributes, domain=DOMAIN, num_outputs=len(node.outputs))
    for new, old in zip(packed.outputs, node.outputs, strict=True):
        typed(new, known_shape(old), old.dtype)
    typed(packed.outputs[0], wanted, node.outputs[0].dtype)
    between = view.inputs[0].producer() if view.inputs[0] is not node.outputs[0] else None  # type: ignore[union-attr]
    replace_node(node, [packed], packed.outputs)
    ir.convenience.replace_all_uses_with(view.outputs[0], packed.outputs[0])
    for each in (view, between):
        if each is not None:
            each.graph.remove(each, safe=True)  # type: ignore[union-attr]
    return True


def _joining_view(out: ir.Value) -> ir.Node | None:
    """The Reshape that joins the heads of an output [B, Hq, T, D], after a Transpose if there is more than a token."""
    turned = only_user(out, "Transpose")
    if turned is None:
        return only_user(out, "Reshape") if 1 in known_shape(out)[1:3] else None
    return only_user(turned.outputs[0], "Reshape") if _moves_heads(turned) else None


def _moves_heads(node: ir.Node) -> bool:
    return tuple(node.attributes["perm"].as_ints()) == BY_TOKEN


def _whole(parts: list[ir.Value], num_tokens: int) -> ir.Value | None:
    """[B, T, N], if `parts` [B, heads, T, D] are views of all that one Split made of its last axis, in order.

    One part is a view of it all.
    """
    pieces = []
    for part in parts:
        view = part.producer()
        if view is not None and view.op_type == "Transpose" and not view.domain and _moves_heads(view):
            view = None if view.inputs[0] is None else view.inputs[0].producer()
        elif 1 not in known_shape(part)[1:3]:
            return None
        if view is None or view.op_type != "Reshape" or view.domain or view.inputs[0] is None:
            return None
        pieces.append(view.inputs[0])
    whole = pieces[0] if len(pieces) == 1 else split_source(pieces)
    shape = () if whole is None else known_shape(whole)
    return whole if len(shape) == 3 and shape[1] == num_tokens else None
