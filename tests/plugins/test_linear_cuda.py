"""The linear on a GPU, by INT8 and half weights, against float64 NumPy and PyTorch's product in the same precision.

SINKEXPORT_LINEAR: a library that holds capi/linear.cpp; without it one is compiled for this machine's GPU.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from plugins.capi.header import DTYPES, WEIGHT_TYPES
from plugins.capi.kernels import Linear, LinearParams
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

NUM_ROWS = [*range(1, 18), 33, 64, 100]
# (N, K): one output, one unit of k, chunks cut short, tiles cut short, splits of unequal length, outputs enough for the
# tall tiles of 9 .. 16 tokens; the last two have blocks enough for the large tiles of many tokens, without splits and
# with them
SHAPES = {
    "int8": [(1, 16), (7, 48), (33, 208), (99, 1488), (576, 576), (129, 4112), (33001, 48), (24700, 48), (1025, 12304)],
    "half": [(1, 8), (7, 24), (33, 200), (99, 1480), (576, 576), (129, 4104), (33001, 72), (24700, 40), (1025, 12296)],
}
CASES = [(weights, shape) for weights, shapes in SHAPES.items() for shape in shapes]


class Problem:
    """Fresh random inputs on the GPU: sums of about unit size, INT8 weights of all 256 values.

    weights: ``int8 | half``. A scale is there in both cases, all ones with half weights, which it is not given to.
    """

    def __init__(
        self, library: Linear, num_rows: int, weights: str, shape: tuple[int, int], dtype: torch.dtype, bias: bool
    ) -> None:
        self.library, self.dtype, self.is_int8 = library, dtype, weights == "int8"
        num_outputs, num_inputs = shape
        self.x = Buffer((num_rows, num_inputs), dtype)
        self.weight = Buffer((num_outputs, num_inputs), torch.int8 if self.is_int8 else dtype)
        self.scale = Buffer((num_outputs,), torch.float32)
        self.bias = Buffer((num_outputs,), dtype)
        self.y = Buffer((num_rows, num_outputs), dtype)
        self.x.tensor.normal_()
        if self.is_int8:
            self.weight.tensor.random_(-128, 128)
            self.scale.tensor.uniform_(0.5, 1.5).mul_(1 / (74 * num_inputs**0.5))
        else:
            self.weight.tensor.normal_().mul_(num_inputs**-0.5)
            self.scale.tensor.fill_(1.0)
        self.bias.tensor.normal_()
        self.has_bias = bias
        self.params = LinearParams(
            num_rows,
            num_inputs,
            num_outputs,
            DTYPES[str(dtype).removeprefix("torch.")],
            self.x.address,
            self.weight.address,
            self.scale.address if self.is_int8 else 0,
            self.bias.address if bias else 0,
            self.y.address,
            False,
            WEIGHT_TYPES[weights],
        )
        self.workspace = Buffer((library.workspace_bytes(self.params),), torch.uint8)

    def launch(self) -> None:
        assert self.library.problem(self.params) is None
        error = self.library.launch(self.params, self.workspace.address, torch.cuda.current_stream().cuda_stream)
        assert error == 0

    def poison(self) -> None:
        self.y.whole.fill_(0xFF)
        self.workspace.whole.fill_(0xFF)

    def run(self) -> torch.Tensor:
        self.poison()
        self.launch()
        torch.cuda.synchronize()
        return self.y.tensor.clone()

    def float64(self) -> np.ndarray:
        x, weight, scale, bias = (b.tensor.double().cpu().numpy() for b in (self.x, self.weight, self.scale, self.bias))
        return x @ weight.T * scale + (bias if self.has_bias else 0)

    def torch(self) -> torch.Tensor:
        """What a model in this precision computes with dequantised weights."""
        weight = (self.weight.tensor.float() * self.scale.tensor[:, None]).to(self.dtype)
        return torch.nn.functional.linear(self.x.tensor, weight, self.bias.tensor if self.has_bias else None)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Linear:
    torch.manual_seed(int.from_bytes(os.urandom(4)))
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if path := os.environ.get("SINKEXPORT_LINEAR"):
        return Linear(Path(path))
    return build(Linear, tmp_path_factory.mktemp("linear"), "native")


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("weights", "shape"), CASES, ids=[f"{weights}-{n}x{k}" for weights, (n, k) in CASES])
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_error_is_at_most_twice_pytorchs(library, record_property, num_rows, weights, shape, dtype, bias):
    problem = Problem(library, num_rows, weights, shape, dtype, bias)
    expected = problem.float64()
    ours, theirs = error(problem.run(), expected), error(problem.torch(), expected)
    record_property("ours", ours)
    record_property("theirs", theirs)
    # Of one or few outputs PyTorch's may be nearly exact by luck: no error is asked to be below that of rounding.
    rounding = error(torch.from_numpy(expected).to(dtype), expected)
    assert ours <= 2 * max(theirs, rounding)
    for buffer in (problem.x, problem.weight, problem.scale, problem.bias, problem.y, problem.workspace):
        assert buffer.untouched_outside()


def test_exact_where_floats_are(library):
    """Small integers: every product and sum is exact, so every weight must meet its own input, in all tiles."""
    for num_rows in NUM_ROWS:
        for weights, shape in CASES:
            problem = Problem(library, num_rows, weights, shape, torch.float16, False)
            problem.x.tensor.random_(-1, 2)
            problem.weight.tensor.random_(-3, 4)
            if problem.is_int8:
                problem.scale.tensor.fill_(0.25)
            else:
                problem.weight.tensor.mul_(0.25)
            # Sums of 12304 such products deviate by 181, and float16 holds all quarters up to 512.
            np.testing.assert_array_equal(problem.run().double().cpu().numpy(), problem.float64())


def test_every_weight_value_is_exact(library):
    for dtype in (torch.float16, torch.bfloat16):
        problem = Problem(library, 16, "int8", (256, 16), dtype, False)
        problem.x.tensor.copy_(torch.eye(16))
        values = (torch.arange(256)[:, None] + 37 * torch.arange(16)) % 256 - 128
        problem.weight.tensor.copy_(values)
        problem.scale.tensor.fill_(1.0)
        assert torch.equal(problem.run().T.cpu().long(), values)


def test_every_half_weight_is_taken_as_it_is(library):
    for dtype in (torch.float16, torch.bfloat16):
        for num_rows in (8, 16, 24):
            problem = Problem(library, num_rows, "half", (256, num_rows), dtype, False)
            problem.x.tensor.copy_(torch.eye(num_rows))
            problem.weight.tensor[0, :2] = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).tiny])
            assert torch.equal(problem.run().T, problem.weight.tensor)


@pytest.mark.parametrize("weights", SHAPES)
@pytest.mark.parametrize("num_rows", [1, 8, 16, 17, 64])
def test_repeats_to_the_bit(library, num_rows, weights):
    problem = Problem(library, num_rows, weights, (576, 4112), torch.float16, True)
    first = problem.run()
    for _ in range(20):
        assert torch.equal(problem.run(), first)


@pytest.mark.parametrize("weights", SHAPES)
@pytest.mark.parametrize("num_rows", [1, 5, 16, 64])
def test_replays_in_a_graph_on_new_inputs(library, num_rows, weights):
    problem = Problem(library, num_rows, weights, (1543, 1488), torch.bfloat16, True)
    problem.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        problem.launch()
    for _ in range(3):
        problem.x.tensor.normal_()
        expected = problem.run()
        problem.poison()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(problem.y.tensor, expected)


@pytest.mark.parametrize("weights", SHAPES)
@pytest.mark.parametrize("num_rows", [1, 5, 16, 64])
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("constant_weight", [False, True])
def test_each_launch_waits_for_the_one_before(library, num_rows, captured, constant_weight, weights):
    """A chain of launches that read what the last one wrote and write what it read, with and without waiting between.

    Kernels may be placed before the one ahead of them has ended: they must not read or write too early.
    """
    links = 24
    layers = [Problem(library, num_rows, weights, (768, 768), torch.float16, True) for _ in range(links)]
    start, ping, pong = (torch.randn(num_rows, 768, dtype=torch.float16, device="cuda") for _ in range(3))
    for i, layer in enumerate(layers):
        layer.params.x, layer.params.y = (t.data_ptr() for t in ((ping, pong) if i % 2 == 0 else (pong, ping)))
        layer.params.constant_weight = constant_weight
        layer.workspace = layers[0].workspace

    def chain(wait: bool) -> None:
        ping.copy_(start)
        for layer in layers:
            layer.launch()
            if wait:
                torch.cuda.synchronize()

    chain(wait=True)
    expected = ping.clone()
    assert expected.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    if captured:
        with torch.cuda.graph(graph):
            chain(wait=False)
    for _ in range(20):
        ping.fill_(float("nan"))
        if captured:
            graph.replay()
        else:
            chain(wait=False)
        torch.cuda.synchronize()
        assert torch.equal(ping, expected)
