"""expand_experts: matmuls of MoE experts in standard operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sinkexport.graph.passes.expand_experts import ExpandExperts
from sinkexport.model.experts import expert_matmul

from tests.exporter.graph.passes.expert_graphs import Operands, cases, expert_graph, run
from tests.exporter.graph.passes.pass_checks import check_left_alone, kinds, parsed


@pytest.mark.parametrize(("shape", "picks", "is_transposed"), cases())
def test_against_numpy_and_torch(shape: tuple[int, ...], picks: int | None, is_transposed: bool) -> None:
    given = Operands(shape, picks, is_transposed=is_transposed)
    want = given.matmul(given.taken)
    model = expert_graph(given.weight, shape, picks, is_transposed=is_transposed)
    assert ExpandExperts()(model).modified
    check_left_alone(model, ExpandExperts())
    assert "ExpertMatmul" not in kinds(model)
    np.testing.assert_allclose(run(model, **given.inputs), want, rtol=1e-4, atol=1e-3)
    chosen = None if given.picks is None else torch.from_numpy(given.picks)
    traced = expert_matmul(torch.from_numpy(given.x), torch.from_numpy(given.weight), chosen, is_transposed)
    np.testing.assert_allclose(traced.numpy(), want, rtol=1e-4, atol=1e-3)


def test_left_alone() -> None:
    check_left_alone(parsed("y = MatMul (x, k)", "float[2, 3] x, float[3, 4] k", "float[2, 4] y"), ExpandExperts())
