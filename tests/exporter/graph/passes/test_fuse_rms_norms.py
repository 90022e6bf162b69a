"""fuse_rms_norms: a norm that a model spells out becomes RMSNormalization."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from sinkexport.graph.graph_pass import PassContext
from sinkexport.graph.passes.fuse_rms_norms import FuseRmsNorms
from sinkexport.targets import CPU

from tests.exporter.graph.passes.pass_checks import (
    check_left_alone,
    check_same_results,
    kinds,
    numbers,
    parsed,
    written,
)

NORM = """
    {square}
    mean = ReduceMean <keepdims = 1> (square, axes)
    small = Add (mean, epsilon)
    root = Sqrt (small)
    inverse = Reciprocal (root)
    normal = Mul ({wide}, inverse)
    {ending}
"""
POW, MUL = "square = Pow ({x}, two)", "square = Mul ({x}, {x})"


def norm_graph(
    *, square: str = POW, half: bool = False, axis: int = -1, power: float = 2.0, weight: str = "weight"
) -> ir.Model:
    dtype, wide = ("float16", "wide") if half else ("float", "x")
    head = "wide = Cast <to = 1> (x)\n" if half else ""
    ending = f"narrow = Cast <to = 10> (normal) y = Mul ({weight}, narrow)" if half else f"y = Mul (normal, {weight})"
    return parsed(
        head + NORM.format(square=square.format(x=wide), wide=wide, ending=ending),
        f"{dtype}[2, 3, 8] x, {dtype}[1] scalar",
        f"{dtype}[2, 3, 8] y",
        f"{written('weight', numbers(8, dtype='float16' if half else 'float32'))}, float epsilon = {{0.01}}, "
        f"float two = {{{power}}}, int64[1] axes = {{{axis}}}",
    )


def test_a_power_of_minus_a_half_for_the_cpu_library() -> None:
    body = NORM.format(square=POW.format(x="x"), wide="x", ending="y = Mul (normal, weight)")
    body = body.replace("root = Sqrt (small)", "").replace("Reciprocal (root)", "Pow (small, power)")

    def model(power: float) -> ir.Model:
        constants = f"{written('weight', numbers(8))}, float epsilon = {{0.01}}, float two = {{2}}"
        constants += f", float power = {{{power}}}, int64[1] axes = {{-1}}"
        return parsed(body, "float[2, 3, 8] x", "float[2, 3, 8] y", constants)

    norm = model(-0.5)
    check_same_results(norm, FuseRmsNorms(PassContext(CPU)))
    assert kinds(norm) == ["RMSNormalization"]
    check_left_alone(model(-0.5), FuseRmsNorms())
    check_left_alone(model(-1.0), FuseRmsNorms(PassContext(CPU)))


def test_without_a_scale_for_the_cpu_library() -> None:
    def model() -> ir.Model:
        body = NORM.format(square=POW.format(x="x"), wide="x", ending="y = Neg (normal)")
        constants = "float epsilon = {0.01}, float two = {2}, int64[1] axes = {-1}"
        return parsed(body, "float[2, 3, 8] x", "float[2, 3, 8] y", constants)

    norm = model()
    check_same_results(norm, FuseRmsNorms(PassContext(CPU)))
    assert kinds(norm) == ["Neg", "RMSNormalization"]
    check_left_alone(model(), FuseRmsNorms())


@pytest.mark.parametrize("changes", [{}, {"square": MUL}, {"half": True}], ids=str)
def test_a_norm_becomes_one_operator(changes: dict) -> None:
    model = norm_graph(**changes)
    check_same_results(model, FuseRmsNorms(), rtol=2.0**-9 if "half" in changes else 1e-6)
    assert kinds(model) == ["RMSNormalization"]


@pytest.mark.parametrize(
    "changes", [{"axis": 1}, {"power": 3.0}, {"weight": "scalar"}, {"square": "square = Mul (x, two)"}], ids=str
)
def test_left_alone(changes: dict) -> None:
    check_left_alone(norm_graph(**changes), FuseRmsNorms())


def test_types_that_differ_are_left_alone() -> None:
    """Gemma scales in float32 what was float16: RMSNormalization has one type."""
    model = parsed(
        "wide = Cast <to = 1> (x)"
        + NORM.format(square=MUL.format(x="wide"), wide="wide", ending="y = Mul (normal, w)"),
        "float16[2, 8] x",
        "float[2, 8] y",
        f"{written('w', np.ones(8, np.float32))}, float epsilon = {{0.01}}, int64[1] axes = {{-1}}",
    )
    check_left_alone(model, FuseRmsNorms())
