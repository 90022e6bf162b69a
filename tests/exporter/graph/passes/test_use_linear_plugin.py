"""use_linear_plugin: matmuls by float16 weights as HalfLinear nodes."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from sinkexport.graph.passes.fold_weight_transposes import FoldWeightTransposes
from sinkexport.graph.passes.use_linear_plugin import UseLinearPlugin

from tests.exporter.graph.passes.pass_checks import (
    check_left_alone,
    check_same_results,
    kinds,
    numbers,
    parsed,
    written,
)

ROUNDING = 2.0**-9


def linear(body: str, *, depth: int = 16, dtype: str = "float16", outputs: str | None = None) -> ir.Model:
    """W [depth, 5] turned by the pass before."""
    kind = "float16" if dtype == "float16" else "float"
    model = parsed(
        f"W = Transpose <perm = [1, 0]> (w) {body}",
        f"{kind}[2, 3, {depth}] x, int64[2] ids",
        outputs or f"{kind}[2, 3, 5] y",
        ", ".join([written("w", numbers(5, depth, dtype=dtype)), written("b", numbers(5, dtype=dtype, seed=1))]),
    )
    FoldWeightTransposes()(model)
    return model


@pytest.mark.parametrize(
    ("body", "expected", "has_bias"),
    [
        ("y = MatMul (x, W)", ["HalfLinear"], 0),
        ("s = MatMul (x, W) y = Add (s, b)", ["HalfLinear"], 1),
        ("s = MatMul (x, W) u = Add (s, b) v = Exp (s) y = Add (u, v)", ["Add", "Add", "Exp", "HalfLinear"], 0),
    ],
    ids=["plain", "bias", "a bias that is not alone"],
)
def test_matmuls_that_become_nodes(body: str, expected: list[str], has_bias: int) -> None:
    model = linear(body.replace("v = Exp (s)", "n = Neg (s) v = Exp (n)") if "Exp" in body else body)
    (before,) = (node for node in model.graph if node.op_type == "MatMul")
    assert before.inputs[1].name == "w.T"
    check_same_results(model, UseLinearPlugin(), rtol=ROUNDING)
    assert [kind for kind in kinds(model) if kind != "Neg"] == expected
    (node,) = (node for node in model.graph if node.op_type == "HalfLinear")
    assert node.inputs[1].name == "w"
    assert node.attributes["has_bias"].as_int() == has_bias


def test_a_tied_table_stays_one_tensor() -> None:
    model = linear("y = MatMul (x, W) z = Gather (w, ids)", outputs="float16[2, 3, 5] y, float16[2, 16] z")
    check_same_results(model, UseLinearPlugin(), rtol=ROUNDING)
    assert [name for name, value in model.graph.initializers.items() if value.uses() and "shape" not in name] == ["w"]


@pytest.mark.parametrize("changes", [{"depth": 12}, {"dtype": "float32"}], ids=str)
def test_left_alone(changes: dict) -> None:
    check_left_alone(linear("y = MatMul (x, W)", **changes), UseLinearPlugin())
