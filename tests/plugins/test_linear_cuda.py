"""The linear on a GPU, by INT8, INT4 and half weights, against float64 and PyTorch's matmul in the same precision.

SINKEXPORT_LINEAR: a library that holds capi/linear.cpp; without it one is compiled for this machine's GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from plugins.capi.kernels import Linear, LinearParams
from tests.plugins.gpu_buffers import Buffer
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

NUM_ROWS = [*range(1, 18), 33, 64, 100]
# (N, K): one output, one unit of k, chunks cut short, tiles cut short, splits of unequal length, outputs enough for the
# tall tiles of 9 .. 16 tokens; the last two have blocks enough for the large tiles of many tokens, without splits and
# with them
SHAPES = {
    "int8": [(1, 16), (7, 48), (33, 208), (99, 1488), (576, 576), (129, 4112), (33001, 48), (24700, 48), (1025, 12304)],
    "half": [(1, 8), (7, 24), (33, 200), (99, 1480), (576, 576), (129, 4104), (33001, 72), (24700, 40), (1025, 12296)],
}
# All forms of INT4 at some sizes: a last block, a last tile and a last chunk that are not full, and one block of all
SHAPES |= {form: [(1, 8), (33, 200), (99, 1480), (576, 576), (1025, 4168)] for form in FORMS_OF_INT4}
SHAPES["int4-32z"] = SHAPES["int4-128"] = SHAPES["half"]
CASES = [(weights, shape) for weights, shapes in SHAPES.items() for shape in shapes]


class OneMatrix(Problem):
    """A linear, with or without a bias."""

    def __init__(
        self, library: Linear, num_rows: int, weights: str, shape: tuple[int, int], dtype: torch.dtype, bias: bool
    ) -> None:
        super().__init__(library, weights, num_rows, num_rows, shape, dtype)
        self.bias = Buffer(shape[0], dtype=dtype)
        self.bias.tensor.normal_()
        self.has_bias = bias
        self.params = LinearParams(**self.common, bias=self.bias.address if bias else 0)
        self.workspace = Buffer(library.workspace_bytes(self.params), dtype=torch.uint8)

    def buffers(self) -> tuple[Buffer, ...]:
        return *super().buffers(), self.bias

    def scratch(self) -> tuple[Buffer, ...]:
        return (self.workspace,)

    def float64(self) -> np.ndarray:
        bias = self.bias.tensor.double() if self.has_bias else 0
        return (self.x.tensor.double() @ self.dense().mT + bias).cpu().numpy()

    def torch(self) -> torch.Tensor:
        bias = self.bias.tensor if self.has_bias else None
        return torch.nn.functional.linear(self.x.tensor, self.half_weight(), bias)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return library_for_gpu(
        "SINKEXPORT_LINEAR", Linear, lambda: build(Linear, tmp_path_factory.mktemp("linear"), "native")
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("weights", "shape"), CASES, ids=[f"{weights}-{n}x{k}" for weights, (n, k) in CASES])
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_error_is_at_most_twice_pytorchs(library, record_property, num_rows, weights, shape, dtype, bias):
    check_error(OneMatrix(library, num_rows, weights, shape, dtype, bias), record_property)


def test_exact_where_floats_are(library):
    """Small integers: every product and sum is exact, so every weight must meet its own input, in all tiles."""
    for num_rows in NUM_ROWS:
        for weights, shape in CASES:
            problem = OneMatrix(library, num_rows, weights, shape, torch.float16, False)
            problem.use_small_integers(0.25)
            # Sums of 12304 such products deviate by 181, and float16 holds all quarters up to 512.
            np.testing.assert_array_equal(problem.run().double().cpu().numpy(), problem.float64())


def test_every_weight_value_is_exact(library):
    for dtype in (torch.float16, torch.bfloat16):
        problem = OneMatrix(library, 16, "int8", (256, 16), dtype, False)
        problem.x.tensor.copy_(torch.eye(16))
        values = (torch.arange(256)[:, None] + 37 * torch.arange(16)) % 256 - 128
        problem.weight.tensor.copy_(values)
        problem.scale.tensor.fill_(1.0)
        assert torch.equal(problem.run().T.cpu().long(), values)


@pytest.mark.parametrize("form", FORMS_OF_INT4)
def test_every_int4_value_is_exact(library, form):
    """Values with every zero point, at every place of a tile."""
    for dtype in (torch.float16, torch.bfloat16):
        for num_rows in (8, 16, 64):
            problem = OneMatrix(library, num_rows, form, (256, num_rows), dtype, False)
            problem.x.tensor.copy_(torch.eye(num_rows))
            problem.use_integers((torch.arange(256)[:, None] + 7 * torch.arange(num_rows)) % 16, scale=2.0)
            assert torch.equal(problem.run().T.double(), problem.dense())


def test_every_half_weight_is_taken_as_it_is(library):
    for dtype in (torch.float16, torch.bfloat16):
        for num_rows in (8, 16, 24):
            problem = OneMatrix(library, num_rows, "half", (256, num_rows), dtype, False)
            problem.x.tensor.copy_(torch.eye(num_rows))
            problem.weight.tensor[0, :2] = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).tiny])
            assert torch.equal(problem.run().T, problem.weight.tensor)


@pytest.mark.parametrize("weights", SHAPES)
@pytest.mark.parametrize("num_rows", [1, 8, 16, 17, 64])
def test_repeats_to_the_bit(library, num_rows, weights):
    check_repeats(OneMatrix(library, num_rows, weights, (576, 4112), torch.float16, True))


@pytest.mark.parametrize("weights", SHAPES)
@pytest.mark.parametrize("num_rows", [1, 5, 16, 64])
def test_replays_in_a_graph_on_new_inputs(library, num_rows, weights):
    problem = OneMatrix(library, num_rows, weights, (1543, 1488), torch.bfloat16, True)
    check_replays(problem, problem.x.tensor.normal_)


@pytest.mark.parametrize("weights", SHAPES)
@pytest.mark.parametrize("num_rows", [1, 5, 16, 64])
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("constant_weight", [False, True])
def test_each_launch_waits_for_the_one_before(library, num_rows, captured, constant_weight, weights):
    layers = [OneMatrix(library, num_rows, weights, (768, 768), torch.float16, True) for _ in range(24)]
    for layer in layers:
        layer.params.constant_weight = constant_weight
        layer.workspace = layers[0].workspace
    check_chain(layers, num_rows, 768, captured, before=lambda layer: None)
