"""What a file would say of values that no reader needs: ONNX Runtime keeps all of it for as long as a session lives."""

from __future__ import annotations

import onnx_ir as ir

from sinkexport.graph.graph_pass import GraphPass


class DropValueNotes(GraphPass):
    """Clear the converter's notes on all values, and types and shapes of constants, which their tensors have too."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Clear them."""
        modified = False
        constants = [
            v for v in model.graph.initializers.values() if v.const_value is not None and not v.is_graph_input()
        ]
        for value in constants:
            modified |= value.type is not None or value.shape is not None
            value.type = value.shape = None
        results = [value for node in model.graph for value in node.outputs]
        for value in [*model.graph.inputs, *constants, *results]:
            modified |= bool(value.metadata_props)
            value.metadata_props.clear()
        return ir.passes.PassResult(model, modified)
