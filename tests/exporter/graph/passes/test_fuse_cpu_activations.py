"""fuse_cpu_activations: activations and gates of feed-forward blocks by the CPU library's matmul."""

from __future__ import annotations

import pytest
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
