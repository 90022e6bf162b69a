"""use_norm_plugin, on one pattern each: what it takes, leaves, and computes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from sinkexport.graph.passes.use_norm_plugin import UseNormPlugin

from tests.exporter.graph.passes.pass_checks import check_left_alone, evaluated, kinds, parsed, random_inputs

WIDTH = 16


def run_both(model: ir.Model, scale: float) -> tuple[list[str], list[np.ndarray], list[np.ndarray]]:
    """The nodes afterwards, and what comes out before and after."""
    inputs = random_inputs(model, scale)
    before = evaluated(model, inputs)
    assert UseNormPlugin()(model).modified
    found, after = kinds(model), evaluated(model, inputs)
    check_left_alone(model, UseNormPlugin())
    return found, before, after


def norm(x: str, y: str, ending: str) -> str:
    """The nodes of y = the norm of x as models of float16 have them; names end in y's."""
    return f"""
        wide_{y} = Cast <to = 1> ({x})
        square_{y} = Pow (wide_{y}, two)
        mean_{y} = ReduceMean <keepdims = 1> (square_{y}, axes)
        small_{y} = Add (mean_{y}, epsilon)
        root_{y} = Sqrt (small_{y})
        inverse_{y} = Reciprocal (root_{y})
        normal_{y} = Mul (wide_{y}, inverse_{y})
        {ending.format(y=y)}
    """


HALF_WEIGHT = "narrow_{y} = Cast <to = 10> (normal_{y})\n{y} = Mul (weight, narrow_{y})"
FLOAT_WEIGHT = "scaled_{y} = Mul (normal_{y}, weight)\n{y} = Cast <to = 10> (scaled_{y})"
FLOAT_RESULT = "{y} = Mul (normal_{y}, weight)"


def norm_graph(
    body: str,
    *,
    outputs: tuple[str, ...] = ("y",),
    weight: str = "float16",
    width: int = WIDTH,
    result: str = "float16",
) -> ir.Model:
    numbers = 1 + np.arange(width) % 3
    if weight == "float16":  # the text form has the bits of these
        numbers = numbers.astype(np.float16).view(np.uint16)
    values = ", ".join(map(str, numbers))
    return parsed(
        body,
        ", ".join(f"float16[2, 3, {width}] {name}" for name in ("x", "r")),
        ", ".join(f"{result}[2, 3, {width}] {name}" for name in outputs),
        f"{weight}[{width}] weight = {{{values}}}, float epsilon = {{0.1}}, float two = {{2.0}}, "
        "int64[1] axes = {-1}, float16[1] bias = {15360}",
    )


SUM = "h = Add (x, r)\n"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (norm_graph(norm("x", "y", HALF_WEIGHT)), ["RmsNorm"]),
        (norm_graph(norm("x", "y", FLOAT_WEIGHT), weight="float"), ["RmsNorm"]),
        (norm_graph(SUM + norm("h", "y", HALF_WEIGHT)), ["RmsNorm"]),
        (norm_graph(SUM + norm("h", "y", HALF_WEIGHT), outputs=("y", "h")), ["RmsNorm"]),
        (norm_graph(SUM + norm("h", "y", FLOAT_WEIGHT), outputs=("y", "h"), weight="float"), ["RmsNorm"]),
        # The second norm of a sum takes the first one's.
        (
            norm_graph(SUM + norm("h", "y", HALF_WEIGHT) + norm("h", "z", HALF_WEIGHT), outputs=("y", "z")),
            ["RmsNorm", "RmsNorm"],
        ),
        # A stream through two norms.
        (
            norm_graph(
                SUM + norm("h", "y", HALF_WEIGHT) + "k = Add (h, y)\n" + norm("k", "z", HALF_WEIGHT), outputs=("z", "k")
            ),
            ["RmsNorm", "RmsNorm"],
        ),
        (norm_graph("h = Add (x, bias)\n" + norm("h", "y", HALF_WEIGHT)), ["Add", "RmsNorm"]),
    ],
    ids=range(8),
)
def test_norms_that_become_nodes(model: ir.Model, expected: list[str]) -> None:
    """They give what was there, but for a last bit where float32 and float64 fall on two sides of a tie."""
    found, before, after = run_both(model, 100.0)
    assert found == expected
    for got, want in zip(after, before, strict=True):
        assert got.dtype == np.float16
        np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=2.0**-9)
        assert (got != want).mean() <= 0.02


@pytest.mark.parametrize(
    "model",
    [
        norm_graph(norm("x", "y", HALF_WEIGHT), width=12),
        norm_graph(norm("x", "y", FLOAT_RESULT), weight="float", result="float"),
        norm_graph(
            "x_32 = Cast <to = 1> (x)\nr_32 = Cast <to = 1> (r)\nh = Add (x_32, r_32)\n" + norm("h", "y", FLOAT_WEIGHT),
            weight="float",
        ),  # a stream of float32
        norm_graph(
            norm("x", "y", HALF_WEIGHT)
            .replace("axes", "rows")
            .replace("square_y = ", "rows = Constant <value = int64[1] {1}> ()\nsquare_y = ")
        ),
    ],
    ids=["width", "float32 result", "float32 sum", "other axis"],
)
def test_norms_that_stay(model: ir.Model) -> None:
    check_left_alone(model, UseNormPlugin())


def test_a_sum_of_massive_activations_is_rounded_before_the_norm() -> None:
    model = norm_graph(SUM + norm("h", "y", HALF_WEIGHT), outputs=("y", "h"))
    UseNormPlugin()(model)
    x, r = np.full((2, 3, WIDTH), 4096, np.float16), np.full((2, 3, WIDTH), 1.5, np.float16)
    normed, total = evaluated(model, {"x": x, "r": r})  # numbers of float16 lie 4 apart there
    np.testing.assert_array_equal(total, 4096)
    np.testing.assert_array_equal(normed[0, 0], 1 + np.arange(WIDTH) % 3)
