"""use_cpu_experts: matmuls of chosen experts as nodes of the CPU library."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from sinkexport.graph.passes.use_cpu_experts import UseCpuExperts
from sinkexport.graph.weight_bytes import weight_bytes

from tests.exporter.graph.passes.expert_graphs import E, K, M, expert_graph
from tests.exporter.graph.passes.pass_checks import check_left_alone, evaluated, kinds, numbers
from tests.exporter.graph.passes.plans import context


def graph(*, is_transposed: bool, in_place: bool = True, dtype: str = "float32") -> tuple[ir.Model, np.ndarray]:
    """A graph of 4 choices, and its matrices as [E, K, M]."""
    weight = numbers(*((E, K, M) if is_transposed else (E, M, K)), dtype=dtype)
    model = expert_graph(weight, (2, K), 4, is_transposed=is_transposed, in_place=in_place)
    return model, weight if is_transposed else weight.transpose(0, 2, 1)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(
    ("under_test", "kind", "error"),
    [(UseCpuExperts(), "FloatExpertLinear", 1e-5), (UseCpuExperts(context()), "Int8ExpertLinear", 2e-2)],
    ids=["float32", "int8"],
)
def test_chosen_experts(under_test: UseCpuExperts, kind: str, error: float, is_transposed: bool) -> None:
    model, matrices = graph(is_transposed=is_transposed)
    assert under_test(model).modified
    assert kinds(model) == [kind]
    x, picks = numbers(2, K, seed=1), np.array([4, 0, 4, 2])
    want = np.repeat(x.astype(np.float64), 2, axis=0)[:, None] @ matrices[picks].astype(np.float64)
    (got,) = evaluated(model, {"x": x, "picks": picks})
    np.testing.assert_allclose(got.astype(np.float64), want[:, 0], atol=error * np.abs(want).max())
    check_left_alone(model, under_test)


def test_bytes_of_the_experts_that_can_be_chosen_count() -> None:
    model, _ = graph(is_transposed=False)
    UseCpuExperts()(model)
    padded = -(-M // 16) * 16
    assert weight_bytes(model) == 4 * padded * K * 4  # four picks of five


@pytest.mark.parametrize("changes", [{"in_place": False}, {"dtype": "float16"}], ids=str)
def test_left_alone(changes: dict) -> None:
    check_left_alone(graph(is_transposed=True, **changes)[0], UseCpuExperts())
