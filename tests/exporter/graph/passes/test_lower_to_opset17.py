"""lower_to_opset17: what TensorRT 8.5's parser does not know is written out."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from sinkexport.graph.passes.lower_to_opset17 import OPSET, LowerToOpset17
from sinkrt.errors import UsageError

from tests.exporter.graph.passes.pass_checks import (
    check_left_alone,
    check_same_results,
    kinds,
    numbers,
    parsed,
    written,
)
from tests.support import refused

NORM = ", ".join([written("g", numbers(6, seed=1)), written("b", numbers(6, seed=2))])

INTS = "int64[3] repeats = {1, 1, 1}, int64[2] pads = {2, 0}, int64[1] first = {-3}"


@pytest.mark.parametrize(
    ("body", "lost"),
    [
        ("y = ReduceMean <keepdims = 1> (x, axes) ", ""),
        ("y = ReduceMax (x, axes) ", ""),
        ("y = ReduceL2 (x, axes) ", ""),
        ("y = ReduceL1 (x, axes) ", ""),
        ("c = GreaterOrEqual (x, x) d = Not (c) e = Or (c, d) f = And (e, c) y = Where (f, x, x)", ""),
        ("y = RMSNormalization <axis = -1, epsilon = 0.01> (x, g)", "RMSNormalization"),
        ("y = Pad (x, pads, , first)", ""),
        ("t = Tile (x, repeats) u = Abs (t) v = Log (u) y = Floor (v)", ""),
        ("u, v = Split <axis = -1, num_outputs = 2> (x) y = Mul (u, v)", ""),
        ("y = Gelu (x)", "Gelu"),
        ('y = Gelu <approximate = "tanh"> (x)', "Gelu"),
        ("y = Mish (x)", "Mish"),
        ("y = HardSwish (x)", "HardSwish"),
        ("y = LeakyRelu <alpha = 0.01> (x)", ""),
        ("t = Sin (x) u = Cos (t) v = Elu (u) y = Sign (v)", ""),
        ("y = LayerNormalization <axis = -1, epsilon = 0.01> (x, g, b)", "LayerNormalization"),
        ("y = LayerNormalization <axis = 2, epsilon = 0.01> (x, g)", "LayerNormalization"),
    ],
)
def test_operators(body: str, lost: str) -> None:
    shape = (
        "2, 3, 1" if "Reduce" in body else "2, 3, 3" if "Split" in body else "4, 3, 6" if "Pad" in body else "2, 3, 6"
    )
    model = parsed(body, "float[2, 3, 6] x", f"float[{shape}] y", f"{NORM}, int64[1] axes = {{-1}}, {INTS}")
    check_same_results(model, LowerToOpset17(), rtol=1e-5)
    assert model.opset_imports[""] == OPSET
    assert lost not in kinds(model)
    model.ir_version = 8
    onnx.checker.check_model(_standard(model), full_check=True)


def _standard(model: ir.Model) -> onnx.ModelProto:
    model.opset_imports.pop("ai.sinkexport", None)
    return ir.to_proto(model)


def test_what_has_no_form_is_refused() -> None:
    model = parsed("y = Swish (x)", "float[2, 6] x", "float[2, 6] y")
    with pytest.raises(ValueError, match=r"Swish .* has no form in opset 17 here"):
        LowerToOpset17()(model)
    model = parsed("y = RMSNormalization <axis = 1> (x, k)", "float[2, 3, 6] x, float[3, 6] k", "float[2, 3, 6] y")
    with pytest.raises(ValueError, match="over more than the last axis"):
        LowerToOpset17()(model)
    model = parsed("y = LayerNormalization <axis = 1> (x, k)", "float[2, 3, 6] x, float[3, 6] k", "float[2, 3, 6] y")
    with pytest.raises(ValueError, match="over more than the last axis"):
        LowerToOpset17()(model)


def test_a_refusal_is_about_the_target_not_the_model() -> None:
    with refused("target tensorrt", "Swish", "use --native", error=UsageError):
        LowerToOpset17()(parsed("y = Swish (x)", "float[2, 6] x", "float[2, 6] y"))


def test_left_alone() -> None:
    model = parsed("y = ReduceMax <axes = [1]> (x)", "float[2, 6] x", "float[2, 1] y", opset=17, ir_version=8)
    check_left_alone(model, LowerToOpset17())
    np.testing.assert_equal(kinds(model), ["ReduceMax"])
