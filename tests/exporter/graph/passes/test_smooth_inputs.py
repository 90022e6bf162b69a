"""smooth_inputs: channels move from inputs into weights, and results stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common
from sinkexport.graph.passes.fold_weight_transposes import FoldWeightTransposes
from sinkexport.graph.passes.smooth_inputs import SmoothInputs

from tests.exporter.graph.passes.pass_checks import (
    check_left_alone,
    check_same_results,
    kinds,
    numbers,
    parsed,
    written,
)
from tests.exporter.graph.passes.plans import SimplePlan, context

DIVISORS = np.array([2.0, 4.0, 0.5, 8.0])


def smooth(**divisors: np.ndarray) -> SmoothInputs:
    return SmoothInputs(context(SimplePlan(smooth=divisors.get)))


def linear(body: str, *, output: str = "float[2, 3, 5] y") -> ir.Model:
    """W [4, 5] and V [6, 4] turned by the pass before; g, b [4] of a norm."""
    model = parsed(
        f"W = Transpose <perm = [1, 0]> (w) V = Transpose <perm = [1, 0]> (v) {body}",
        "float[2, 3, 4] x, float[2, 3, 6] h, float[2, 3, 4] up",
        output,
        ", ".join(
            [
                written("w", numbers(5, 4)),
                written("v", numbers(4, 6, seed=1)),
                written("g", numbers(4, seed=2) + 3),
                written("b", numbers(4, seed=3)),
            ]
        ),
    )
    FoldWeightTransposes()(model)
    common.RemoveUnusedNodesPass()(model)
    return model


NORM = "n = RMSNormalization <axis = -1, epsilon = 0.01> (x, g) y = MatMul (n, W)"
LAYER_NORM = "n = LayerNormalization <axis = -1, epsilon = 0.01> (x, g, b) y = MatMul (n, W)"
GATE = "u = MatMul (h, V) s = Sigmoid (up) n = Mul (s, u) y = MatMul (n, W)"
BIASED_GATE = "t = MatMul (h, V) u = Add (t, b) s = Sigmoid (up) n = Mul (s, u) y = MatMul (n, W)"


@pytest.mark.parametrize(
    ("body", "num_multiplications"),
    [(NORM, 0), (LAYER_NORM, 0), (GATE, 1), (BIASED_GATE, 1), ("n = Tanh (x) y = MatMul (n, W)", 1)],
    ids=["norm", "layer norm", "gate", "gate with a bias", "nothing takes it over"],
)
def test_results_stay(body: str, num_multiplications: int) -> None:
    """A norm, or the matmul that a gate multiplies, takes the division over; elsewhere it is a Mul."""
    model = linear(body)
    check_same_results(model, smooth(w=DIVISORS))
    assert kinds(model).count("Mul") == num_multiplications
    (matmul,) = (node for node in model.graph if node.op_type == "MatMul" and node.outputs[0].name == "y")
    np.testing.assert_array_equal(matmul.inputs[1].const_value.numpy(), (numbers(5, 4) * DIVISORS).T.astype(np.float32))


def test_an_input_that_is_read_elsewhere_keeps_its_values() -> None:
    model = linear(NORM + " z = Exp (n)", output="float[2, 3, 5] y, float[2, 3, 4] z")
    check_same_results(model, smooth(w=DIVISORS))
    assert kinds(model) == ["Exp", "MatMul", "Mul", "RMSNormalization"]


def test_left_alone() -> None:
    """Without a plan, without divisors for the module, without a matmul."""
    check_left_alone(linear(NORM), SmoothInputs())
    check_left_alone(linear(NORM), smooth(other=DIVISORS))
    check_left_alone(linear("y = Exp (x)", output="float[2, 3, 4] y"), smooth(w=DIVISORS))
