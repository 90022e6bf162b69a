"""fuse_cpu_output_norms: multipliers and norms of a matmul's result by the CPU library's node."""

from __future__ import annotations

import pytest
from sinkexport.graph.passes.fuse_cpu_activations import FuseCpuActivations
from sinkexport.graph.passes.fuse_cpu_additions import FuseCpuAdditions
from sinkexport.graph.passes.fuse_cpu_output_norms import FuseCpuOutputNorms

from tests.exporter.graph.passes.cpu_graphs import linear_graph, linear_of
from tests.exporter.graph.passes.pass_checks import check_left_alone, check_same_results, kinds

NORM = "y = RMSNormalization <axis = -1, epsilon = 0.01> ({}, b)"


@pytest.mark.parametrize(
    ("body", "multiplier", "output_norm"),
    [
        ("y = Mul (s, two)", 2.0, 0),
        ("y = Mul (two, s)", 2.0, 0),
        (NORM.format("s"), 1.0, 1),
        (f"m = Mul (s, two) {NORM.format('m')}", 2.0, 1),
    ],
)
def test_what_follows_a_matmul(body: str, multiplier: float, output_norm: int) -> None:
    model = linear_graph(body)
    check_same_results(model, FuseCpuOutputNorms(), rtol=1e-5)
    assert kinds(model) == ["FloatLinear"]
    fields = linear_of(model).attributes
    assert (fields["multiplier"].as_float(), fields["output_norm"].as_int()) == (multiplier, output_norm)


def test_a_residual_is_added_last() -> None:
    model = linear_graph(f"m = Mul (s, two) {NORM.format('m').replace('y', 'n', 1)} y = Add (r, n)")
    check_same_results(model, FuseCpuOutputNorms(), rtol=1e-5)
    check_same_results(model, FuseCpuAdditions(), rtol=1e-5)
    assert kinds(model) == ["FloatLinear"]


def test_nothing_before_a_multiplier_is_fused_after_it() -> None:
    """Biases and activations come before it in the node."""
    for body, other in (
        ("m = Mul (s, two) y = Add (m, b)", FuseCpuAdditions()),
        ("m = Mul (s, two) a = Gelu (m) y = Identity (a)", FuseCpuActivations()),
    ):
        model = linear_graph(body)
        check_same_results(model, FuseCpuOutputNorms(), rtol=1e-5)
        check_left_alone(model, other)


@pytest.mark.parametrize(
    "body",
    [
        "m = Mul (s, two) v = Neg (s) y = Add (m, v)",
        "y = Mul (s, b)",
        "y = Mul (s, s)",
        "y = RMSNormalization <axis = 1, epsilon = 0.01> (s, s)",
        f"{NORM.format('s').replace('y', 'n', 1)} y = Add (n, s)",
    ],
)
def test_left_alone(body: str) -> None:
    check_left_alone(linear_graph(body), FuseCpuOutputNorms())


def test_not_after_a_residual() -> None:
    model = linear_graph("u = Add (s, r) y = Mul (u, two)")
    assert FuseCpuAdditions()(model).modified
    check_left_alone(model, FuseCpuOutputNorms())
