"""Root-mean-square norms as the single ONNX operator RMSNormalization (arXiv:1910.07467)."""

from __future__ import annotations

import onnx_ir as ir

from sinkexport.graph.edit import replace_node, typed
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.rms_norms import find_rms_norms


class FuseRmsNorms(GraphPass):
    """Fuse every norm over the last axis whose input, scale and result have one type.

    RMSNormalization itself computes in float32 (stash_type) and scales in the type of its input. Norms with a power of
    -1/2 are fused for the CPU library, which takes them into its nodes; other targets keep their operators.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the last node of each norm; those before it are left without use."""
        norms = find_rms_norms(model.graph, with_powers=self.context.target.has_cpu_library)
        found = [n for n in norms if n.x.dtype == n.scale.dtype == n.last.outputs[0].dtype]
        for norm in found:
            fused = ir.node(
                "RMSNormalization",
                [norm.x, norm.scale],
                {"axis": -1, "epsilon": norm.epsilon, "stash_type": int(ir.DataType.FLOAT)},
            )
            result = norm.last.outputs[0]
            typed(fused.outputs[0], result.shape, result.dtype)  # type: ignore[arg-type]
            replace_node(norm.last, [fused], fused.outputs)
        return ir.passes.PassResult(model, bool(found))
