"""Reshapes with constant targets, none in a row, none that changes nothing; moving unit axes is a Reshape too.

With one token a step most of a model's view and transpose calls move no data. But each would still be a node, and
its target shape would be put together from pieces at run time.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape, replace_node, static_shape
from sinkexport.graph.graph_pass import GraphPass

_VIEWS = frozenset(("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Identity", "Expand"))


class MakeReshapesStatic(GraphPass):
    """Turn every view of the graph into at most one Reshape with a constant shape."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace views. Those that are in this form are made anew, which names of nodes show and nothing else."""
        graph, modified = model.graph, False
        for node in list(graph):
            if node.domain or node.op_type not in _VIEWS:
                continue
            source, result = node.inputs[0], node.outputs[0]
            if source is None or static_shape(source) is None or static_shape(result) is None:
                continue
            if _moves_no_data(node):
                modified |= _replace_by_view(graph, node, _before_views(source))
        return ir.passes.PassResult(model, modified)


def _moves_no_data(node: ir.Node) -> bool:
    source, result = node.inputs[0], node.outputs[0]
    before, after = known_shape(source), known_shape(result)  # type: ignore[arg-type]
    if node.op_type == "Expand":
        return before == after or np.prod(before) == np.prod(after)
    if node.op_type == "Transpose":
        perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(before))[::-1]
        moved = [axis for axis in perm if before[axis] != 1]
        return moved == sorted(moved)
    return True


def _before_views(value: ir.Value) -> ir.Value:
    """What a chain of Reshapes started from, as far as its shape is known."""
    node = value.producer()
    while node is not None and not node.domain and node.op_type == "Reshape":
        if static_shape(node.inputs[0]) is None or node.inputs[0] is None:
            break
        value = node.inputs[0]
        node = value.producer()
    return value


def _replace_by_view(graph: ir.Graph, node: ir.Node, source: ir.Value) -> bool:
    """Put one Reshape of `source`, or `source` itself, in the place of `node`. Returns whether they differ."""
    result = node.outputs[0]
    shape = known_shape(result)
    if known_shape(source) == shape and not result.is_graph_output():
        ir.convenience.replace_all_uses_with(result, source)
        graph.remove(node, safe=True)
        return True
    b = Builder(graph)
    target = b.ints(shape, "shape")
    differs = node.op_type != "Reshape" or list(node.inputs) != [source, target]
    view = b.op("Reshape", [source, target], shape, result.dtype)
    view.name = result.name
    replace_node(node, b.nodes, [view])
    return differs
