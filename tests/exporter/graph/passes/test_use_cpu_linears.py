"""use_cpu_linears: matmuls by float32 weights, and tables that they share, as nodes of the CPU library."""

from __future__ import annotations

import pytest
from sinkexport.graph.passes.use_cpu_linears import UseCpuLinears

from tests.exporter.graph.passes.cpu_graphs import DEPTH, WIDTH, linear_graph, linear_of
from tests.exporter.graph.passes.pass_checks import check_left_alone, check_same_results, kinds, parsed


@pytest.mark.parametrize("width", [16, WIDTH, 33])
def test_a_matmul_becomes_a_node(width: int) -> None:
    model = linear_graph("y = Neg (s)", converted=False, width=width)
    check_same_results(model, UseCpuLinears(), rtol=1e-5)
    assert kinds(model) == ["FloatLinear", "Neg"]
    fields = {name: attribute.value for name, attribute in linear_of(model).attributes.items()}
    assert (fields["in_features"], fields["out_features"], fields["layout"]) == (DEPTH, width, "n16")
    assert (fields["block_size"], fields["has_zero_points"], fields["activation"]) == (0, 0, "none")


def test_a_tied_table_stays_one_tensor() -> None:
    body, outputs = "y = MatMul (x, W) t = Gather (w, ids)", f"float[2, 3, {WIDTH}] y, float[2, {DEPTH}] t"
    model = linear_graph(body, outputs, converted=False)
    check_same_results(model, UseCpuLinears(), rtol=1e-5)
    assert [kind for kind in kinds(model) if kind != "Reshape"] == ["FloatLinear", "FloatRows"]
    read = [name for name, value in model.graph.initializers.items() if value.uses() and not name.startswith("const.")]
    assert read == ["w.n16"]


def test_left_alone() -> None:
    check_left_alone(parsed("y = MatMul (x, z)", "float[2, 3] x, float[3, 4] z", "float[2, 4] y"), UseCpuLinears())
