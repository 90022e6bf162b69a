"""fuse_cpu_additions: biases and residuals by the CPU library's matmul."""

from __future__ import annotations

import pytest
from sinkexport.graph.passes.fuse_cpu_additions import FuseCpuAdditions

from tests.exporter.graph.passes.cpu_graphs import linear_graph, linear_of
from tests.exporter.graph.passes.pass_checks import check_left_alone, check_same_results, kinds


@pytest.mark.parametrize(
    ("body", "has_bias", "has_residual"),
    [
        ("y = Add (s, b)", 1, 0),
        ("y = Add (b, s)", 1, 0),
        ("y = Add (s, r)", 0, 1),
        ("u = Add (s, b) y = Add (r, u)", 1, 1),
    ],
)
def test_what_is_added(body: str, has_bias: int, has_residual: int) -> None:
    model = linear_graph(body)
    check_same_results(model, FuseCpuAdditions(), rtol=1e-5)
    assert kinds(model) == ["FloatLinear"]
    fields = linear_of(model).attributes
    assert (fields["has_bias"].as_int(), fields["has_residual"].as_int()) == (has_bias, has_residual)


def test_only_one_residual() -> None:
    model = linear_graph("u = Add (s, r) v = Neg (r) y = Add (u, v)")
    check_same_results(model, FuseCpuAdditions(), rtol=1e-5)
    assert kinds(model) == ["Add", "FloatLinear", "Neg"]


@pytest.mark.parametrize("body", ["u = Add (s, b) v = Neg (s) y = Mul (u, v)", "y = Add (s, s)", "y = Add (s, two)"])
def test_left_alone(body: str) -> None:
    check_left_alone(linear_graph(body), FuseCpuAdditions())
