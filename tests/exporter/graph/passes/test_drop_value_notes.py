"""drop_value_notes: files say nothing twice, and nothing of the converter's."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from sinkexport.graph.passes.drop_value_notes import DropValueNotes

from tests.exporter.graph.passes.pass_checks import check_left_alone, check_same_results, parsed, written

GRAPH = "y = Add (x, w)"


def noted() -> ir.Model:
    model = parsed(GRAPH, "float[2] x", "float[2] y", written("w", np.ones(2, np.float32)))
    weight = model.graph.initializers["w"]
    weight.type, weight.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([2])
    for value in (weight, model.graph.inputs[0]):
        value.metadata_props["pkg.torch.export.kind"] = "PARAMETER"
    return model


def test_notes_and_what_tensors_say_too() -> None:
    model = noted()
    check_same_results(model, DropValueNotes())
    proto = ir.to_proto(model)
    assert not [info for info in proto.graph.value_info if info.name == "w"]
    assert not proto.graph.input[0].metadata_props
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2


def test_left_alone() -> None:
    model = noted()
    DropValueNotes()(model)
    check_left_alone(model, DropValueNotes())
