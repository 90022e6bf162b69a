"""Constants that two graphs of a bundle share: by name if it is a parameter's, else by what they hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from sinkexport.pipeline.bundle_writer import write_graph, write_graph_with_weights_of


def graph_of(**constants: np.ndarray) -> ir.Model:
    """x plus constants [200]."""
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [200])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [200])
    initializers = [numpy_helper.from_array(array, name.replace("__", ".")) for name, array in constants.items()]
    node = helper.make_node("Sum", ["x", *(tensor.name for tensor in initializers)], ["y"])
    graph = helper.make_graph([node], "g", [x], [output], initializers)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def constants_of(path: Path) -> dict[str, np.ndarray]:
    model = onnx.load(path)
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_numbered_constants_of_one_name_keep_their_numbers(tmp_path: Path) -> None:
    ones, twos, weight = (np.full(200, i, np.float32) for i in (1, 2, 3))
    write_graph(graph_of(val_1=ones, val_2=twos, model__w=weight), tmp_path, "a.onnx", lambda *_: None)
    write_graph_with_weights_of(graph_of(val_1=twos, val_2=twos, model__w=weight), tmp_path, "b.onnx", "a.onnx")
    found = constants_of(tmp_path / "b.onnx")
    assert (found["val_1"][0], found["val_2"][0], found["model.w"][0]) == (2, 2, 3)
    plain = onnx.load(tmp_path / "b.onnx", load_external_data=False)
    is_shared = {tensor.name: bool(tensor.external_data) for tensor in plain.graph.initializer}
    assert is_shared == {"val_1": False, "val_2": True, "model.w": True}
