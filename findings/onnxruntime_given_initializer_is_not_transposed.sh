#!/usr/bin/env bash
# onnxruntime 1.32.0 (onnx 1.23.2, numpy 2.4.6).
# Expected: SessionOptions.add_initializer gives a session a constant whose data lies in another file. The graph then
#   computes what it computes where ONNX Runtime reads the file.
# Happens: at the level of optimisation that is the default, a Transpose that is moved past a Mul makes ONNX Runtime
#   reshape the Mul's constant from [96] to [1, 96, 1]. The session still puts in the constant that it was given, of shape
#   [96]: "Attempting to broadcast an axis by a dimension other than 1". Where both shapes can be broadcast (four rows
#   of four), it multiplies along the wrong axis, without an error.
# Why it matters: add_initializer is the way to map weights once for several sessions. Whoever gives all of them gets
#   wrong numbers, or a failure in the first run, as soon as a graph has such a pair of Transposes (Mamba layers do).
# Exits with 0 if this is seen, 1 if not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper


def write_graph(rows, scale):
    """y = x * scale[:, None], as a Mul between two Transposes; scale lies in another file."""
    scale.tofile("scale.bin")
    constant = TensorProto(name="scale", data_type=TensorProto.FLOAT, dims=scale.shape,
                           data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "scale.bin"), ("offset", 0), ("length", scale.nbytes)):
        constant.external_data.add(key=key, value=str(value))
    nodes = [helper.make_node("Transpose", ["x"], ["a"], perm=[0, 2, 1]),
             helper.make_node("Mul", ["a", "scale"], ["b"]),
             helper.make_node("Transpose", ["b"], ["y"], perm=[0, 2, 1])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, scale.size, rows]) for name in "xy")
    graph = helper.make_graph(nodes, "graph", [x], [y], [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, "graph.onnx")


def seen(given, scale, x, level):
    """What a session returns: right, other numbers, or its error."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = level
    value = ort.OrtValue.ortvalue_from_numpy(scale)
    if given:
        options.add_initializer("scale", value)
    try:
        y = ort.InferenceSession("graph.onnx", options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    except Exception as error:
        return "error: " + str(error).partition("Attempting")[2].strip()
    return "right" if np.array_equal(y, x * scale[:, None]) else "other numbers"


print("onnxruntime", ort.__version__)
found = []
levels = ort.GraphOptimizationLevel
for rows, size in ((4, 96), (4, 4)):
    scale = np.arange(1, size + 1, dtype=np.float32)
    x = np.random.default_rng(0).standard_normal((1, size, rows)).astype(np.float32)
    write_graph(rows, scale)
    for given, level in ((False, levels.ORT_ENABLE_ALL), (True, levels.ORT_DISABLE_ALL), (True, levels.ORT_ENABLE_ALL)):
        found.append(seen(given, scale, x, level))
        source = "given" if given else "read from its file"
        print(f"{rows} rows, constant of {size}, {source}, {level.name}: {found[-1]}")
others_are_right = {*found[:2], *found[3:5]} == {"right"}
sys.exit(0 if others_are_right and found[2].startswith("error") and found[5] == "other numbers" else 1)
PY
