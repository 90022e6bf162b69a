"""fold_weight_transposes: weights in MatMul's orientation, tied tables through Gemm."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from sinkexport.graph.matmuls import ROWS
from sinkexport.graph.passes.fold_weight_transposes import FoldWeightTransposes

from tests.exporter.graph.passes.pass_checks import (
    check_left_alone,
    check_same_results,
    kinds,
    numbers,
    parsed,
    written,
)

WEIGHT = written("w", numbers(5, 4))


def linear(body: str, outputs: str = "float[2, 3, 5] y") -> ir.Model:
    return parsed(body, "float[2, 3, 4] x, int64[2] ids", outputs, WEIGHT)


def test_a_weight_of_one_matmul_is_stored_transposed() -> None:
    model = linear("t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t)")
    check_same_results(model, FoldWeightTransposes())
    assert kinds(model) == ["MatMul"]
    (matmul,) = model.graph
    assert matmul.inputs[1].name == "w.T"
    ((name, rows),) = matmul.inputs[1].meta[ROWS]
    assert name == "w"
    np.testing.assert_array_equal(rows.numpy(), numbers(5, 4))


def test_a_tied_table_stays_one_tensor() -> None:
    model = linear(
        "t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t) z = Gather (w, ids)", "float[2, 3, 5] y, float[2, 4] z"
    )
    check_same_results(model, FoldWeightTransposes())
    assert kinds(model) == ["Gather", "Gemm", "Reshape", "Reshape"]
    assert "w.T" not in model.graph.initializers


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ("t = Transpose <perm = [1, 0]> (w) y = Add (t, t)", "4, 5"),
        ("t = Transpose <perm = [0, 1]> (w) y = MatMul (k, t)", "4, 4"),
        ("t = Transpose <perm = [1, 0]> (w) y = MatMul (t, w)", "4, 4"),
        ("y = Transpose <perm = [1, 0]> (w)", "4, 5"),
        ("y = Transpose <perm = [1, 0]> (k)", "5, 4"),
    ],
    ids=["no matmul", "no turn", "left operand", "output", "no weight"],
)
def test_left_alone(body: str, shape: str) -> None:
    check_left_alone(parsed(body, "float[4, 5] k", f"float[{shape}] y", WEIGHT), FoldWeightTransposes())
