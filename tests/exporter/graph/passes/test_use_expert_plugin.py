"""use_expert_plugin: matmuls of chosen experts as plugin nodes. Whole bundles: test_plugin_experts.py."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from sinkexport.graph.passes.use_expert_plugin import UseExpertPlugin
from sinkexport.quant.weight import WeightScheme

from tests.exporter.graph.passes.expert_graphs import E, K, M, expert_graph
from tests.exporter.graph.passes.pass_checks import check_left_alone, evaluated, kinds, numbers
from tests.exporter.graph.passes.plans import SimplePlan, context


def graph(*, is_transposed: bool, in_place: bool = True, depth: int = K) -> tuple[ir.Model, np.ndarray]:
    """A graph of 4 choices, and its matrices as [E, K, M]."""
    weight = numbers(*((E, depth, M) if is_transposed else (E, M, depth)), dtype="float16")
    model = expert_graph(weight, (2, depth), 4, is_transposed=is_transposed, in_place=in_place)
    return model, weight if is_transposed else weight.transpose(0, 2, 1)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(
    ("under_test", "kind", "error"),
    [
        (UseExpertPlugin(), "HalfExpertLinear", 2e-3),
        (UseExpertPlugin(context()), "Int8ExpertLinear", 2e-2),
        (UseExpertPlugin(context(SimplePlan(WeightScheme(4, 32)))), "Int4ExpertLinear", 0.2),
        (UseExpertPlugin(context(SimplePlan(WeightScheme(4, 32, symmetric=False)))), "Int4ExpertLinear", 0.2),
    ],
    ids=["float16", "int8", "int4", "int4-zeros"],
)
def test_chosen_experts(under_test: UseExpertPlugin, kind: str, error: float, is_transposed: bool) -> None:
    model, matrices = graph(is_transposed=is_transposed)
    assert under_test(model).modified
    assert [name for name in kinds(model) if name != "Cast"] == [kind]
    x, picks = numbers(2, K, dtype="float16", seed=1), np.array([4, 0, 4, 2])
    want = np.repeat(x.astype(np.float64), 2, axis=0)[:, None] @ matrices[picks].astype(np.float64)
    (got,) = evaluated(model, {"x": x, "picks": picks})
    np.testing.assert_allclose(got.astype(np.float64), want[:, 0], atol=error * np.abs(want).max())
    check_left_alone(model, under_test)


def test_matrices_whose_depth_the_kernel_does_not_take_stay_in_float16() -> None:
    model, _ = graph(is_transposed=False, depth=24)
    assert UseExpertPlugin(context())(model).modified
    assert "HalfExpertLinear" in kinds(model)


def test_left_alone() -> None:
    """What was traced for standard operators."""
    for under_test in (UseExpertPlugin(), UseExpertPlugin(context(SimplePlan()))):
        check_left_alone(graph(is_transposed=True, in_place=False)[0], under_test)
