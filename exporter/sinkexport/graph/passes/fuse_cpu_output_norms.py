"""Multipliers and RMS norms of a matmul's result, by the CPU library's node of the matmul (Granite, Gemma 2 and 3)."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sinkexport.graph.cpu_fusion import absorb
from sinkexport.graph.cpu_nodes import Linear, find_linears
from sinkexport.graph.edit import drop_unused, is_weight, known_shape, number_times, only_user
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.rms_norms import row_norm


class FuseCpuOutputNorms(GraphPass):
    """A linear whose only reader multiplies by one number, or normalises its rows, does that itself.

    A residual is added after both.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse the multiplier, then the norm."""
        graph, modified = model.graph, drop_unused(model.graph)
        for fuse in (_with_multiplier, _with_norm):
            modified |= absorb(graph, find_linears(graph), fuse)
        return ir.passes.PassResult(model, modified)


def _result(node: ir.Node) -> ir.Value:
    """The result of a linear, or the view that alone reads it and keeps its rows."""
    result = node.outputs[0]
    view = only_user(result, "Reshape")
    keeps_rows = view is not None and known_shape(view.outputs[0])[-1:] == known_shape(result)[-1:]
    return view.outputs[0] if view is not None and keeps_rows else result


def _with_multiplier(node: ir.Node, linear: Linear) -> tuple[ir.Node, Linear] | None:
    found = number_times(_result(node))
    if found is None or linear.multiplier != 1.0 or linear.residual is not None:
        return None
    if linear.output_norm_weight is not None:
        return None
    reader, number = found
    return reader, dataclasses.replace(linear, multiplier=number)


def _with_norm(node: ir.Node, linear: Linear) -> tuple[ir.Node, Linear] | None:
    result = _result(node)
    reader = only_user(result, "RMSNormalization")
    norm = row_norm(reader)
    if reader is None or norm is None or norm.x is not result or not is_weight(norm.scale):
        return None
    if linear.output_norm_weight is not None or linear.residual is not None:
        return None
    return reader, dataclasses.replace(linear, output_norm_weight=norm.scale, output_norm_epsilon=norm.epsilon)
