"""Slices that cut a matmul's result into its parts, as one Split (Phi-3: queries, keys and values in one matrix)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import is_weight, known_shape, operand, optional
from sinkexport.graph.graph_pass import GraphPass


class FuseCpuSlices(GraphPass):
    """Slices of the last axis that are all that reads a value, one after another without a gap, become one Split."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each such group of Slices."""
        graph, modified = model.graph, False
        for node in list(graph):
            if node.op_type != "Slice" or node.domain or node.graph is None:
                continue
            whole = operand(node, 0)
            parts = _parts(whole)
            if parts is None:
                continue
            b = Builder(graph)
            sizes = [end - start for start, end in sorted(parts)]
            pieces = b.split(whole, sizes, -1)
            graph.insert_before(node, b.nodes)
            for (_, each), piece in zip(sorted(parts.items()), pieces, strict=True):
                ir.convenience.replace_all_uses_with(each.outputs[0], piece, replace_graph_outputs=True)
                graph.remove(each, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def _parts(whole: ir.Value) -> dict[tuple[int, int], ir.Node] | None:
    """The Slices that read a value by begin and end; None: they do not make up just the whole."""
    size = known_shape(whole)[-1]
    parts = {}
    for use in whole.uses():
        ends = _ends(use.node, len(known_shape(whole)), size) if use.idx == 0 else None
        if ends is None or ends in parts:
            return None
        parts[ends] = use.node
    at = 0
    for start, end in sorted(parts):
        if start != at:
            return None
        at = end
    return parts if len(parts) > 1 and at == size and not whole.is_graph_output() else None


def _ends(node: ir.Node, rank: int, size: int) -> tuple[int, int] | None:
    """Begin and end of a Slice of the last axis alone, by constants."""
    given = [optional(node, i) for i in range(1, 5)]
    if node.op_type != "Slice" or node.domain or any(value is not None and not is_weight(value) for value in given):
        return None
    starts, ends, axes, steps = (None if v is None else v.const_value.numpy().reshape(-1) for v in given)  # type: ignore[union-attr]
    if starts is None or ends is None or axes is None or len(starts) != 1 or axes[0] not in (-1, rank - 1):
        return None
    if steps is not None and not np.all(steps == 1):
        return None
    start, end, _ = slice(int(starts[0]), int(ends[0])).indices(size)
    return (start, end) if start < end else None
