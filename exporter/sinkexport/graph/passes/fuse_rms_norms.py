"""Root-mean-square norms as the single ONNX operator RMSNormalization (arXiv:1910.07467)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sinkexport.graph.edit import constant, drop_unused, known_shape, replace_node, typed
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.rms_norms import find_rms_norms, find_unscaled_norms


class FuseRmsNorms(GraphPass):
    """Fuse every norm over the last axis whose input, scale and result have one type.

    RMSNormalization itself computes in float32 (stash_type) and scales in the type of its input. For the CPU library,
    which takes norms into its nodes, norms with a power of -1/2 and norms without a scale are fused too; other targets
    keep their operators.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the last node of each norm; those before it are left without use."""
        graph, takes_all = model.graph, self.context.target.has_cpu_library
        norms = find_rms_norms(graph, with_powers=takes_all)
        found = [n for n in norms if n.x.dtype == n.scale.dtype == n.last.outputs[0].dtype]
        for norm in found:
            _replace(norm.last, norm.x, norm.scale, norm.epsilon)
        modified = bool(found)
        if takes_all and modified:
            drop_unused(graph)  # what is left of these norms
        for x, epsilon, last in find_unscaled_norms(graph) if takes_all else ():
            ones = constant(graph, np.ones(known_shape(x)[-1], np.float32), "ones")
            _replace(last, x, ones, epsilon)
            modified = True
        return ir.passes.PassResult(model, modified)


def _replace(last: ir.Node, x: ir.Value, scale: ir.Value, epsilon: float) -> None:
    fused = ir.node(
        "RMSNormalization", [x, scale], {"axis": -1, "epsilon": epsilon, "stash_type": int(ir.DataType.FLOAT)}
    )
    result = last.outputs[0]
    typed(fused.outputs[0], result.shape, result.dtype)  # type: ignore[arg-type]
    replace_node(last, [fused], fused.outputs)
