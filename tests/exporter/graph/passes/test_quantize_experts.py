"""quantize_experts: matmuls of MoE experts with INT8 weights and inputs of 15 bits."""

from __future__ import annotations

import numpy as np
import pytest
from sinkexport.graph.passes.quantize_experts import QuantizeExperts

from tests.exporter.graph.passes.expert_graphs import E, K, M, Operands, cases, expert_graph, run
from tests.exporter.graph.passes.pass_checks import check_left_alone, kinds
from tests.exporter.graph.passes.plans import SimplePlan, context


@pytest.mark.parametrize(("shape", "picks", "is_transposed"), cases())
def test_against_rounded_weights(shape: tuple[int, ...], picks: int | None, is_transposed: bool) -> None:
    given = Operands(shape, picks, is_transposed=is_transposed)
    model = expert_graph(given.weight, shape, picks, is_transposed=is_transposed)
    under_test = QuantizeExperts(context())
    assert under_test(model).modified
    check_left_alone(model, under_test)
    assert "MatMulInteger" in kinds(model)
    got = run(model, **given.inputs)
    inner = 1 if is_transposed else 2
    scale = np.abs(given.taken).max(axis=inner, keepdims=True) / 127
    matrices = np.rint(given.taken / scale) * scale
    want = given.matmul(matrices)
    # An input is off by half a step at most: 2^-15 of the token's largest.
    sizes = np.abs(matrices).sum(axis=inner)[:, None, :]
    allowed = np.abs(given.rows).max(axis=-1, keepdims=True) * sizes / 2 / 16256
    allowed = (allowed if picks is None else allowed[:, 0]) + 1e-5 * np.abs(want)
    assert (np.abs(got - want) <= allowed + 1e-6).all()


def test_tokens_of_zeros() -> None:
    model = expert_graph(np.ones((E, K, M), np.float32), (3, K), 3, is_transposed=True)
    QuantizeExperts(context())(model)
    assert not run(model, x=np.zeros((3, K), np.float32), picks=np.array([0, 1, 2])).any()


def test_left_alone() -> None:
    """Without a plan, and where the plan keeps the experts."""
    for under_test in (QuantizeExperts(), QuantizeExperts(context(SimplePlan(keep=("experts.w",))))):
        check_left_alone(expert_graph(np.ones((E, K, M), np.float32), (3, K), 3, is_transposed=True), under_test)
