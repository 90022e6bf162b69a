"""fuse_cpu_activations: activations and gates of feed-forward blocks by the CPU library's matmul."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from sinkexport.graph.passes.fold_constants import FoldConstants
from sinkexport.graph.passes.fuse_cpu_activations import FuseCpuActivations
from sinkexport.graph.passes.fuse_cpu_additions import FuseCpuAdditions

from tests.exporter.graph.passes.cpu_graphs import linear_graph, linear_of
from tests.exporter.graph.passes.pass_checks import check_left_alone, check_same_results, kinds

HALVES = "g0, u0 = Split <axis = -1, num_outputs = 2> (s)"
ACTIVATIONS = {
    "silu": "m = Sigmoid ({0}) a = Mul ({0}, m)",
    "gelu": "a = Gelu ({0})",
    "gelu_tanh": 'a = Gelu <approximate = "tanh"> ({0})',
    "relu2": "m = Relu ({0}) a = Pow (m, two)",
}


SPELLED = {
    "phi": ("gelu_tanh", "hh = Mul ({0}, half) p = Pow ({0}, three) q = Mul (p, cubic) t = Add ({0}, q) "
            "r1 = Mul (t, root) n = Tanh (r1) o = Add (n, one) a = Mul (hh, o)"),
    "bloom": ("gelu_tanh", "hh = Mul ({0}, half) k1 = Mul ({0}, root) k2 = Mul ({0}, cubic) k3 = Mul (k2, {0}) "
              "k4 = Add (k3, one) k5 = Mul (k1, k4) n = Tanh (k5) o = Add (n, one) a = Mul (hh, o)"),
    "erf": ("gelu", "d = Div ({0}, sqrt2) e = Erf (d) o = Add (e, one) p = Mul ({0}, o) a = Mul (p, half)"),
    "relu squared": ("relu2", "m = Relu ({0}) a = Mul (m, m)"),
    "divided": ("silu", "n = Neg ({0}) e = Exp (n) o = Add (e, one) a = Div ({0}, o)"),
}  # fmt: skip


def constants(body: str) -> str:
    """Nodes that make the constants of `SPELLED`."""
    numbers = {"half": 0.5, "one": 1.0, "three": 3.0, "cubic": 0.044715, "root": 0.7978845608, "sqrt2": 1.41421356237}
    return " ".join(f"{name} = Constant <value_float = {number}> ()" for name, number in numbers.items()) + " " + body


def spelled_graph(body: str) -> ir.Model:
    model = linear_graph(f"{body} y = Identity (a)")
    FoldConstants()(model)
    return model


@pytest.mark.parametrize("name", SPELLED)
def test_what_is_spelled_out(name: str) -> None:
    activation, body = SPELLED[name]
    model = spelled_graph(constants(body.format("s")))
    check_same_results(model, FuseCpuActivations(), rtol=1e-5)
    assert linear_of(model).attributes["activation"].as_string() == activation


@pytest.mark.parametrize(
    "body",
    [
        SPELLED["phi"][1].replace("cubic", "half"),
        SPELLED["erf"][1].replace("sqrt2", "one"),
        "m = Relu ({0}) a = Mul (m, half)",
        "m = Sigmoid ({0}) a = Mul (m, m)",
        "m = Clip ({0}, one) q = Sigmoid ({0}) a = Mul (m, q)",
    ],
)
def test_other_functions_are_left_alone(body: str) -> None:
    model = spelled_graph(constants(body.format("s")))
    check_left_alone(model, FuseCpuActivations())


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("width", [32, 40])
def test_gates(name: str, width: int) -> None:
    half = width // 2
    body = f"{HALVES} {ACTIVATIONS[name].format('g0')} y = Mul (a, u0)"
    model = linear_graph(body, f"float[2, 3, {half}] y", width=width)
    check_same_results(model, FuseCpuActivations(), rtol=1e-5)
    assert kinds(model) == ["FloatLinear"]
    fields = linear_of(model).attributes
    assert (fields["gated"].as_int(), fields["out_features"].as_int()) == (1, half)
    assert fields["activation"].as_string() == name


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_without_a_gate(name: str) -> None:
    model = linear_graph(f"{ACTIVATIONS[name].format('s')} y = Identity (a)")
    check_same_results(model, FuseCpuActivations(), rtol=1e-5)
    assert kinds(model) == ["FloatLinear", "Identity"]
    assert linear_of(model).attributes["activation"].as_string() == name


def test_a_bias_comes_before() -> None:
    model = linear_graph("t = Add (s, b) g0, u0 = Split <axis = -1, num_outputs = 2> (t) a = Gelu (g0) y = Mul (a, u0)",
                         "float[2, 3, 10] y")  # fmt: skip
    FuseCpuAdditions()(model)
    check_same_results(model, FuseCpuActivations(), rtol=1e-5)
    assert kinds(model) == ["FloatLinear"]


@pytest.mark.parametrize(
    "body",
    [
        f"{HALVES} a = Gelu (u0) y0 = Mul (a, g0) y = Concat <axis = -1> (y0, y0)",  # up comes first
        "a = Gelu (s) n = Neg (s) y = Mul (a, n)",
        "a = Gelu (r) y = Mul (a, s)",
        "t = Add (s, r) a = Gelu (t) y = Identity (a)",
    ],
)
def test_left_alone(body: str) -> None:
    model = linear_graph(body)
    FuseCpuAdditions()(model)
    check_left_alone(model, FuseCpuActivations())
