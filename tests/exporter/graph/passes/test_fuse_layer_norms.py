"""fuse_layer_norms: a layer norm that a model spells out becomes LayerNormalization."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from sinkexport.graph.passes.fuse_layer_norms import FuseLayerNorms

from tests.exporter.graph.passes.pass_checks import (
    check_left_alone,
    check_same_results,
    kinds,
    numbers,
    parsed,
    written,
)

NORM = """
    mean = ReduceMean <keepdims = 1> ({of}, axes)
    off = Sub (x, mean)
    square = Pow (off, two)
    variance = ReduceMean <keepdims = 1> (square, axes)
    again = Sub (x, {less})
    small = Add (variance, epsilon)
    root = Sqrt (small)
    inverse = Reciprocal (root)
    normal = Mul ({centred}, inverse)
    y = Mul (weight, normal)
"""


def norm_graph(*, of: str = "x", less: str = "mean", centred: str = "again", axis: int = -1) -> ir.Model:
    return parsed(
        NORM.format(of=of, less=less, centred=centred),
        "float[2, 3, 8] x, float[2, 3, 8] z, float[2, 3, 1] m",
        "float[2, 3, 8] y",
        f"{written('weight', numbers(8))}, float epsilon = {{0.01}}, float two = {{2}}, int64[1] axes = {{{axis}}}",
    )


@pytest.mark.parametrize("centred", ["again", "off"])
def test_a_norm_becomes_one_operator(centred: str) -> None:
    model = norm_graph(centred=centred)
    check_same_results(model, FuseLayerNorms(), rtol=1e-5)
    assert kinds(model) == ["LayerNormalization"]


@pytest.mark.parametrize(
    "changes", [{"of": "z"}, {"less": "m"}, {"centred": "x"}, {"axis": 1}], ids=["of", "less", "not centred", "axis"]
)
def test_left_alone(changes: dict) -> None:
    check_left_alone(norm_graph(**changes), FuseLayerNorms())
