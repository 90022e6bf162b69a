"""Products by chosen matrices on a GPU against float64 NumPy and PyTorch's products in the same precision.

SINKEXPORT_LINEAR: a library that holds capi/expert_linear.cpp; without it one is compiled for this machine's GPU.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from plugins.capi.header import DTYPES, WEIGHT_TYPES
from plugins.capi.kernels import ExpertLinear, ExpertLinearParams
from tests.plugins.compiler import NVCC
from tests.plugins.gpu_buffers import Buffer, error
from tests.plugins.linear_library import build

# No CI machine has a GPU: this is run by hand, and plugins/README.md keeps what it said.
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: PyTorch sees none"),
    pytest.mark.skipif(
        NVCC is None and "SINKEXPORT_LINEAR" not in os.environ,
        reason="needs CUDA's compiler (no nvcc on the PATH) or SINKEXPORT_LINEAR",
    ),
]

# Experts, tokens, picks of each: one of all; a token's step; groups of one, full and cut short; many experts of whom
# most are not chosen; chunks
MIXTURES = [
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
CASES = [(weights, shape) for weights, shapes in SHAPES.items() for shape in shapes]


class Problem:
    """Fresh random inputs on the GPU: sums of about unit size, INT8 weights of all 256 values.

    weights: ``int8 | half``. mixture: experts, tokens, picks of each token, which are of different experts. expanded: x
    has a row for each pick, as products after the first have.
    """

    def __init__(
        self,
        library: ExpertLinear,
        weights: str,
        mixture: tuple[int, int, int],
        shape: tuple[int, int],
        dtype: torch.dtype,
        expanded: bool = False,
    ) -> None:
        self.library, self.dtype, self.is_int8 = library, dtype, weights == "int8"
        (num_outputs, num_inputs), (num_experts, num_tokens, num_chosen) = shape, mixture
        num_picks = num_tokens * num_chosen
        num_rows = num_picks if expanded else num_tokens
        self.picks = Buffer((num_picks,), torch.int32)
        self.x = Buffer((num_rows, num_inputs), dtype)
        self.weight = Buffer((num_experts, num_outputs, num_inputs), torch.int8 if self.is_int8 else dtype)
        self.scale = Buffer((num_experts, num_outputs), torch.float32)
        self.y = Buffer((num_picks, num_outputs), dtype)
        self.choose(num_tokens, num_experts)
        self.x.tensor.normal_()
        if self.is_int8:
            self.weight.tensor.random_(-128, 128)
            self.scale.tensor.uniform_(0.5, 1.5).mul_(1 / (74 * num_inputs**0.5))
        else:
            self.weight.tensor.normal_().mul_(num_inputs**-0.5)
            self.scale.tensor.fill_(1.0)
        self.params = ExpertLinearParams(
            num_experts,
            num_picks,
            num_rows,
            num_inputs,
            num_outputs,
            DTYPES[str(dtype).removeprefix("torch.")],
            WEIGHT_TYPES[weights],
            self.picks.address,
            self.x.address,
            self.weight.address,
            self.scale.address if self.is_int8 else 0,
            self.y.address,
        )

    def choose(self, num_tokens: int, num_experts: int) -> None:
        """Uneven: some experts are picked often."""
        liked = torch.rand(num_tokens, num_experts, device="cuda") + torch.linspace(0, 1, num_experts, device="cuda")
        picks = liked.topk(self.picks.tensor.numel() // num_tokens).indices
        self.picks.tensor.copy_(picks.flatten())

    def buffers(self) -> tuple[Buffer, ...]:
        return self.picks, self.x, self.weight, self.scale, self.y

    def launch(self) -> None:
        assert self.library.problem(self.params) is None
        assert self.library.launch(self.params, torch.cuda.current_stream().cuda_stream) == 0

    def run(self) -> torch.Tensor:
        self.y.whole.fill_(0xFF)
        self.launch()
        torch.cuda.synchronize()
        return self.y.tensor.clone()

    def rows(self) -> torch.Tensor:
        """x with a row for each pick."""
        return self.x.tensor.repeat_interleave(self.params.num_picks // self.params.num_rows, 0)

    def float64(self) -> np.ndarray:
        weight = self.weight.tensor.double() * self.scale.tensor.double()[..., None]
        return np.stack(
            [
                (weight[pick] @ row).cpu().numpy()
                for pick, row in zip(self.picks.tensor.tolist(), self.rows().double(), strict=True)
            ]
        )

    def torch(self) -> torch.Tensor:
        """What a model in this precision computes with dequantised weights."""
        weight = (self.weight.tensor.float() * self.scale.tensor[..., None]).to(self.dtype)
        return torch.stack(
            [
                torch.nn.functional.linear(row, weight[pick])
                for pick, row in zip(self.picks.tensor.tolist(), self.rows(), strict=True)
            ]
        )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ExpertLinear:
    torch.manual_seed(int.from_bytes(os.urandom(4)))
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if path := os.environ.get("SINKEXPORT_LINEAR"):
        return ExpertLinear(Path(path))
    return build(ExpertLinear, tmp_path_factory.mktemp("expert_linear"), "native")


@pytest.mark.parametrize("expanded", [False, True], ids=["tokens", "picks"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("weights", "shape"), CASES, ids=[f"{weights}-{n}x{k}" for weights, (n, k) in CASES])
@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_error_is_at_most_twice_pytorchs(library, record_property, mixture, weights, shape, dtype, expanded):
    problem = Problem(library, weights, mixture, shape, dtype, expanded)
    expected = problem.float64()
    ours, theirs = error(problem.run(), expected), error(problem.torch(), expected)
    record_property("ours", ours)
    record_property("theirs", theirs)
    # Of one or few outputs PyTorch's may be nearly exact by luck: no error is asked to be below that of rounding.
    rounding = error(torch.from_numpy(expected).to(dtype), expected)
    assert ours <= 2 * max(theirs, rounding)
    assert all(buffer.untouched_outside() for buffer in problem.buffers())


def test_exact_where_floats_are(library):
    """Small integers: every product and sum is exact, so every row must meet the matrix that it picked."""
    for mixture in MIXTURES:
        for weights, shape in CASES:
            problem = Problem(library, weights, mixture, shape, torch.float16)
            problem.x.tensor.random_(-1, 2)
            problem.weight.tensor.random_(-3, 4)
            problem.scale.tensor.fill_(1.0)
            np.testing.assert_array_equal(problem.run().double().cpu().numpy(), problem.float64())


def test_one_expert_for_all_and_picks_out_of_range(library):
    """The fullest group there can be; a pick beyond the experts is of the nearest, and reads nothing else."""
    problem = Problem(library, "half", (7, 100, 3), (48, 64), torch.float16)
    problem.picks.tensor.fill_(3)
    np.testing.assert_array_equal(problem.run()[::3].cpu().numpy(), problem.run()[2::3].cpu().numpy())
    assert error(problem.run(), problem.float64()) < 1e-3
    problem.picks.tensor[:2] = torch.tensor([-5, 1 << 30], dtype=torch.int32)
    beyond = problem.run()
    problem.picks.tensor[:2] = torch.tensor([0, 6], dtype=torch.int32)
    assert torch.equal(problem.run(), beyond)


@pytest.mark.parametrize("weights", SHAPES)
@pytest.mark.parametrize("mixture", [(8, 1, 2), (128, 16, 8), (8, 64, 2)], ids=str)
def test_repeats_to_the_bit(library, weights, mixture):
    """Also where the order in which rows of an expert are found differs."""
    problem = Problem(library, weights, mixture, (576, 1040), torch.float16)
    first = problem.run()
    for _ in range(20):
        assert torch.equal(problem.run(), first)


@pytest.mark.parametrize("weights", SHAPES)
@pytest.mark.parametrize("mixture", [(8, 1, 2), (128, 16, 8), (8, 64, 2)], ids=str)
def test_replays_in_a_graph_on_new_picks(library, weights, mixture):
    problem = Problem(library, weights, mixture, (543, 1488), torch.bfloat16)
    problem.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        problem.launch()
    for _ in range(3):
        problem.x.tensor.normal_()
        problem.choose(mixture[1], mixture[0])
        expected = problem.run()
        problem.y.whole.fill_(0xFF)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(problem.y.tensor, expected)


@pytest.mark.parametrize("weights", SHAPES)
@pytest.mark.parametrize("mixture", [(8, 1, 4), (64, 9, 2)], ids=str)
def test_each_launch_waits_for_the_one_before(library, weights, mixture):
    """A chain of launches that read what the last one wrote, picks as well, in a graph."""
    links = 24
    layers = [Problem(library, weights, mixture, (768, 768), torch.float16, True) for _ in range(links)]
    num_picks = layers[0].params.num_picks
    start, ping, pong = (torch.randn(num_picks, 768, dtype=torch.float16, device="cuda") for _ in range(3))
    picks = torch.empty(num_picks, dtype=torch.int32, device="cuda")
    for i, layer in enumerate(layers):
        layer.params.x, layer.params.y = (t.data_ptr() for t in ((ping, pong) if i % 2 == 0 else (pong, ping)))
        layer.params.picks = picks.data_ptr()

    def chain(wait: bool) -> None:
        ping.copy_(start)
        for layer in layers:
            picks.copy_(layer.picks.tensor)
            layer.launch()
            if wait:
                torch.cuda.synchronize()

    chain(wait=True)
    expected = ping.clone()
    assert expected.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(wait=False)
    for _ in range(20):
        ping.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(ping, expected)
