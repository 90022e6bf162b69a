"""A step's queries, keys and values go to the SinkAttention plugin as the matmul that makes them leaves them.

TensorRT would copy each of the three parts of a Split. With one token the parts lie as attention reads them anyway.
"""

from __future__ import annotations

import onnx_ir as ir

from sinkexport.graph.edit import known_shape, only_user, operand, replace_node, split_source, static_shape, typed
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.operators import DOMAIN, SINK_ATTENTION, Input


class PackHeads(GraphPass):
    """Fuse Split -> 3 Reshapes -> SinkAttention -> Reshape of plugin graphs with static views.

    The matmul's output is [B, 1, (Hq + 2 Hkv) * D], the node's then [B, 1, Hq * D]. Whatever lies between (norms of
    queries and keys, casts) is left alone, and so are chunks.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Pack every node that is not packed yet."""
        nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type == SINK_ATTENTION]
        unpacked = [n for n in nodes if "packed_width" in n.attributes and not n.attributes["packed_width"].as_int()]
        return ir.passes.PassResult(model, sum(_pack(node) for node in unpacked) > 0)


def _pack(node: ir.Node) -> bool:
    heads = _whole([operand(node, i) for i in (Input.Q, Input.K, Input.V)])
    out = node.outputs[0]
    batch, num_heads, num_tokens, head_dim = known_shape(out)
    wanted = (batch, 1, num_heads * head_dim)
    view = only_user(out, "Reshape")
    if heads is None or num_tokens != 1 or view is None or static_shape(view.outputs[0]) != wanted:
        return False
    attributes = {**node.attributes, "packed_width": ir.AttrInt64("packed_width", num_heads * head_dim)}
    inputs = [heads, *node.inputs[3:]]
    packed = ir.node(SINK_ATTENTION, inputs, attributes, domain=DOMAIN, num_outputs=len(node.outputs))
    for new, old in zip(packed.outputs, node.outputs, strict=True):
        typed(new, known_shape(old), old.dtype)
    typed(packed.outputs[0], wanted, out.dtype)
    replace_node(node, [packed], packed.outputs)
    ir.convenience.replace_all_uses_with(view.outputs[0], packed.outputs[0])
    view.graph.remove(view, safe=True)  # type: ignore[union-attr]
    return True


def _whole(parts: list[ir.Value]) -> ir.Value | None:
    """[B, 1, N], if `parts` are views of all that one Split made of its last axis, in order."""
    pieces = []
    for part in parts:
        view = part.producer()
        if view is None or view.op_type != "Reshape" or view.domain or view.inputs[0] is None:
            return None
        pieces.append(view.inputs[0])
    whole = split_source(pieces)
    shape = () if whole is None else known_shape(whole)
    return whole if len(shape) == 3 and shape[1] == 1 else None
