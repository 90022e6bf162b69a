"""The passes that make RmsNorm and GatedActivation nodes, on one pattern each: what they take, leave, and compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import common
from sinkexport.graph.operators import DOMAIN
from sinkexport.graph.passes.plugin_gates import use_gate_plugins
from sinkexport.graph.passes.plugin_norms import use_norm_plugins

from tests.exporter.graph.plugin_evaluator import GatedActivation, RmsNorm

WIDTH = 16


def parsed(body: str, inputs: str, outputs: str, constants: str = "") -> ir.Model:
    """From ONNX's text form, shapes inferred."""
    head = f'<ir_version: 10, opset_import: ["" : 20, "{DOMAIN}" : 1]>'
    text = f"{head} g ({inputs}) => ({outputs}) <{constants}> {{{body}}}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), strict_mode=True))


def kinds(model: ir.Model) -> list[str]:
    common.RemoveUnusedNodesPass()(model)
    return sorted(node.op_type for node in model.graph)


def evaluated(model: ir.Model, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    common.NameFixPass()(model)
    common.TopologicalSortPass()(model)
    return ReferenceEvaluator(ir.to_proto(model), new_ops=[RmsNorm, GatedActivation]).run(None, inputs)


def run_both(model: ir.Model, use: Callable[[ir.Model], int], scale: float) -> tuple[list[str], list[Any], list[Any]]:
    """The nodes afterwards, and what comes out before and after."""
    random = np.random.default_rng(0)
    inputs = {
        str(value.name): (random.normal(size=value.shape.numpy()) * scale).astype(value.dtype.numpy())
        for value in model.graph.inputs
    }
    before = evaluated(model, inputs)
    use(model)
    return kinds(model), before, evaluated(model, inputs)


# --- norms ---


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
    found, before, after = run_both(model, use_norm_plugins, 100.0)
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
    before = kinds(model)
    assert use_norm_plugins(model) == 0
    assert kinds(model) == before


def test_a_sum_of_massive_activations_is_rounded_before_the_norm() -> None:
    model = norm_graph(SUM + norm("h", "y", HALF_WEIGHT), outputs=("y", "h"))
    use_norm_plugins(model)
    x, r = np.full((2, 3, WIDTH), 4096, np.float16), np.full((2, 3, WIDTH), 1.5, np.float16)
    normed, total = evaluated(model, {"x": x, "r": r})  # numbers of float16 lie 4 apart there
    np.testing.assert_array_equal(total, 4096)
    np.testing.assert_array_equal(normed[0, 0], 1 + np.arange(WIDTH) % 3)


# --- gates ---

SILU = "share = Sigmoid (gate)\nactive = Mul (gate, share)\n"
GELU = "active = Gelu (gate)\n"
GELU_TANH = 'active = Gelu <approximate = "tanh"> (gate)\n'
MERGED = "gate, up = Split <axis = -1> (both, sizes)\n"


def gate_graph(
    body: str, *, merged: bool = True, width: int = WIDTH, dtype: str = "float16", outputs: str = "", factor: str = "up"
) -> ir.Model:
    shape = f"{dtype}[2, 3, {width}]"
    inputs = f"{dtype}[2, 3, {2 * width}] both" if merged else f"{shape} gate, {shape} up"
    return parsed(
        (MERGED if merged else "") + body + f"y = Mul (active, {factor})\n",
        inputs,
        f"{shape} y" + (f", {shape} {outputs}" if outputs else ""),
        f"int64[2] sizes = {{{width}, {width}}}",
    )


@pytest.mark.parametrize(
    ("model", "activation", "merged", "expected"),
    [
        (gate_graph(SILU), 0, 1, ["GatedActivation"]),
        (gate_graph(GELU), 1, 1, ["GatedActivation"]),
        (gate_graph(GELU_TANH), 2, 1, ["GatedActivation"]),
        (gate_graph(SILU, merged=False), 0, 0, ["GatedActivation"]),
        (gate_graph(GELU, merged=False), 1, 0, ["GatedActivation"]),
        (gate_graph(SILU, outputs="gate"), 0, 1, ["GatedActivation", "Split"]),  # something else reads a half
        (gate_graph(SILU.replace("gate", "up"), factor="gate"), 0, 0, ["GatedActivation", "Split"]),  # up | gate
    ],
    ids=range(7),
)
def test_gates_that_become_nodes(model: ir.Model, activation: int, merged: int, expected: list[str]) -> None:
    """They differ from what was there by its roundings: of the share, of the activation."""
    found, before, after = run_both(model, use_gate_plugins, 2.0)
    assert found == expected
    (node,) = (node for node in model.graph if node.op_type == "GatedActivation")
    assert [node.attributes[name].as_int() for name in ("activation", "is_merged", "width")] == [
        activation,
        merged,
        WIDTH,
    ]
    np.testing.assert_allclose(after[0].astype(np.float64), before[0].astype(np.float64), rtol=4 * 2.0**-11, atol=2e-3)
    for got, want in zip(after[1:], before[1:], strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "model",
    [
        gate_graph(SILU, width=12),
        gate_graph(SILU, dtype="float"),
        gate_graph(SILU, outputs="share"),
        gate_graph(SILU, outputs="active"),
        gate_graph("share = Sigmoid (gate)\nactive = Mul (up, share)\n"),
        gate_graph("active = Relu (gate)\n"),
    ],
    ids=["width", "float32", "share is read", "activation is read", "another factor", "another activation"],
)
def test_gates_that_stay(model: ir.Model) -> None:
    before = kinds(model)
    assert use_gate_plugins(model) == 0
    assert kinds(model) == before
