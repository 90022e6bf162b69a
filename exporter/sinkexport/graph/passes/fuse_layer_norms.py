"""Layer norms that models spell out as the single ONNX operator LayerNormalization (arXiv:1607.06450)."""

from __future__ import annotations

import onnx_ir as ir

from sinkexport.graph.edit import drop_unused, replace_node, typed
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.rms_norms import find_layer_norms

FLOAT = ir.DataType.FLOAT


class FuseLayerNorms(GraphPass):
    """Fuse every float32 norm over the last axis."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each with one node."""
        modified = False
        for norm in find_layer_norms(model.graph):
            result = norm.last.outputs[0]
            if not norm.x.dtype == norm.scale.dtype == result.dtype == FLOAT:
                continue
            fused = ir.node("LayerNormalization", [norm.x, norm.scale], {"axis": -1, "epsilon": norm.epsilon})
            typed(fused.outputs[0], result.shape, FLOAT)  # type: ignore[arg-type]
            replace_node(norm.last, [fused], fused.outputs)
            modified = True
        if modified:
            drop_unused(model.graph)
        return ir.passes.PassResult(model, modified)
