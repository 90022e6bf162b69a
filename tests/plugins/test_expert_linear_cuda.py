"""Matmuls by chosen matrices on a GPU against float64 NumPy and PyTorch's matmuls in the same precision.

SINKEXPORT_LINEAR: a library that holds capi/expert_linear.cpp; without it one is compiled for this machine's GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from plugins.capi.kernels import ExpertLinear, ExpertLinearParams
from tests.plugins.gpu_buffers import Buffer, error
from tests.plugins.gpu_tests import library_for_gpu, needs_gpu
from tests.plugins.linear_library import build
from tests.plugins.matmul_problem import (
    FORMS_OF_INT4,
    Problem,
    check_chain,
    check_error,
    check_repeats,
    check_replays,
)

pytestmark = needs_gpu("SINKEXPORT_LINEAR")

# Experts, tokens, picks of each: one of all; a token's step; groups of one, full and cut short; many experts of whom
# most are not chosen; chunks
MOES = [
    (1, 1, 1),
    (1, 17, 1),
    (5, 1, 2),
    (8, 1, 2),
    (8, 3, 2),
    (8, 64, 2),
    (32, 16, 4),
    (128, 1, 8),
    (128, 5, 8),
    (128, 64, 8),
    (512, 4, 10),
    (300, 97, 6),
    (512, 204, 10),
]
# (N, K): one output, one unit of k, chunks and tiles cut short, more chunks than warps
SHAPES = {
    "int8": [(1, 16), (7, 48), (33, 208), (96, 1488), (129, 2064)],
    "half": [(1, 8), (7, 24), (33, 200), (96, 1480), (129, 2056)],
}
SHAPES |= {form: [(33, 200), (96, 1480)] for form in FORMS_OF_INT4}
SHAPES["int4-32z"] = SHAPES["int4-128"] = SHAPES["half"]
CASES = [(weights, shape) for weights, shapes in SHAPES.items() for shape in shapes]


class ChosenMatrices(Problem):
    """A matmul by a chosen matrix for each row.

    moe: experts, tokens, picks of each token, which are of different experts. expanded: x has a row for each pick,
    as matmuls after the first have.
    """

    def __init__(
        self,
        library: ExpertLinear,
        weights: str,
        moe: tuple[int, int, int],
        shape: tuple[int, int],
        dtype: torch.dtype,
        expanded: bool = False,
    ) -> None:
        num_experts, num_tokens, num_chosen = moe
        num_picks = num_tokens * num_chosen
        num_rows = num_picks if expanded else num_tokens
        super().__init__(library, weights, num_rows, num_picks, (num_experts, *shape), dtype)
        self.picks = Buffer(num_picks, dtype=torch.int32)
        self.choose(num_tokens, num_experts)
        self.params = ExpertLinearParams(
            **self.common, num_experts=num_experts, num_picks=num_picks, picks=self.picks.address
        )

    def buffers(self) -> tuple[Buffer, ...]:
        return *super().buffers(), self.picks

    def choose(self, num_tokens: int, num_experts: int) -> None:
        """Uneven: some experts are picked often."""
        liked = torch.rand(num_tokens, num_experts, device="cuda") + torch.linspace(0, 1, num_experts, device="cuda")
        picks = liked.topk(self.picks.tensor.numel() // num_tokens).indices
        self.picks.tensor.copy_(picks.flatten())

    def rows(self) -> torch.Tensor:
        """x with a row for each pick."""
        return self.x.tensor.repeat_interleave(self.params.num_picks // self.params.num_rows, 0)

    def float64(self) -> np.ndarray:
        weight = self.dense()
        return np.stack(
            [
                (weight[pick] @ row).cpu().numpy()
                for pick, row in zip(self.picks.tensor.tolist(), self.rows().double(), strict=True)
            ]
        )

    def torch(self) -> torch.Tensor:
        weight = self.half_weight()
        return torch.stack(
            [
                torch.nn.functional.linear(row, weight[pick])
                for pick, row in zip(self.picks.tensor.tolist(), self.rows(), strict=True)
            ]
        )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return library_for_gpu(
        "SINKEXPORT_LINEAR",
        ExpertLinear,
        lambda: build(ExpertLinear, tmp_path_factory.mktemp("expert_linear"), "native"),
    )


@pytest.mark.parametrize("expanded", [False, True], ids=["tokens", "picks"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("weights", "shape"), CASES, ids=[f"{weights}-{n}x{k}" for weights, (n, k) in CASES])
@pytest.mark.parametrize("moe", MOES, ids=str)
def test_error_is_at_most_twice_pytorchs(library, record_property, moe, weights, shape, dtype, expanded):
    check_error(ChosenMatrices(library, weights, moe, shape, dtype, expanded), record_property)


def test_exact_where_floats_are(library):
    """Small integers: every product and sum is exact, so every row must meet the matrix that it picked."""
    for moe in MOES:
        for weights, shape in CASES:
            problem = ChosenMatrices(library, weights, moe, shape, torch.float16)
            problem.use_small_integers(1.0)
            np.testing.assert_array_equal(problem.run().double().cpu().numpy(), problem.float64())


def test_one_expert_for_all_and_picks_out_of_range(library):
    """The fullest group there can be; a pick beyond the experts is of the nearest, and reads nothing else."""
    problem = ChosenMatrices(library, "half", (7, 100, 3), (48, 64), torch.float16)
    problem.picks.tensor.fill_(3)
    np.testing.assert_array_equal(problem.run()[::3].cpu().numpy(), problem.run()[2::3].cpu().numpy())
    assert error(problem.run(), problem.float64()) < 1e-3
    problem.picks.tensor[:2] = torch.tensor([-5, 1 << 30], dtype=torch.int32)
    beyond = problem.run()
    problem.picks.tensor[:2] = torch.tensor([0, 6], dtype=torch.int32)
    assert torch.equal(problem.run(), beyond)


@pytest.mark.parametrize("weights", SHAPES)
@pytest.mark.parametrize("moe", [(8, 1, 2), (128, 16, 8), (8, 64, 2)], ids=str)
def test_repeats_to_the_bit(library, weights, moe):
    """Also where the order in which rows of an expert are found differs."""
    check_repeats(ChosenMatrices(library, weights, moe, (576, 1040), torch.float16))


@pytest.mark.parametrize("weights", SHAPES)
@pytest.mark.parametrize("moe", [(8, 1, 2), (128, 16, 8), (8, 64, 2)], ids=str)
def test_replays_in_a_graph_on_new_picks(library, weights, moe):
    problem = ChosenMatrices(library, weights, moe, (543, 1488), torch.bfloat16)

    def renew() -> None:
        problem.x.tensor.normal_()
        problem.choose(moe[1], moe[0])

    check_replays(problem, renew)


@pytest.mark.parametrize("weights", SHAPES)
@pytest.mark.parametrize("moe", [(8, 1, 4), (64, 9, 2)], ids=str)
def test_each_launch_waits_for_the_one_before(library, weights, moe):
    """Picks, too, come from what is ahead."""
    layers = [ChosenMatrices(library, weights, moe, (768, 768), torch.float16, True) for _ in range(24)]
    num_picks = layers[0].params.num_picks
    picks = torch.empty(num_picks, dtype=torch.int32, device="cuda")
    for layer in layers:
        layer.params.picks = picks.data_ptr()
    check_chain(layers, num_picks, 768, captured=True, before=lambda layer: picks.copy_(layer.picks.tensor))
