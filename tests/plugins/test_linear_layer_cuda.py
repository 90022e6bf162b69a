"""What a linear takes over in a decoder layer, on a GPU: the norm before it, a residual, a gate after it.

SINKEXPORT_LINEAR: a library that holds capi/linear.cpp; without it one is compiled for this machine's GPU.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from plugins.capi.header import ACTIVATIONS
from plugins.capi.kernels import Linear, LinearParams
from tests.plugins.gpu_buffers import Buffer
from tests.plugins.gpu_tests import library_for_gpu, needs_gpu
from tests.plugins.linear_library import build
from tests.plugins.matmul_problem import Problem, check_chain, check_error, check_repeats, check_replays

pytestmark = needs_gpu("SINKEXPORT_LINEAR")

EPSILON = 1e-5
NUM_ROWS = [*range(1, 10), 16, 17, 64, 100]
WEIGHTS = ("int8", "half", "int4-32", "int4-128z")
# (N, K): fewer warps with work than there are, chunks and tiles cut short, many tiles a block, x too large to be held
SHAPES = [(32, 16), (96, 592), (1152, 576), (288, 4112), (24704, 48), (64, 17408)]
FORMS = ("norm", "float norm", "residual", "norm silu", "gelu", "float norm gelu_tanh", "norm residual")
MODULES = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


class Layer(Problem):
    """A linear with what `form` names, biases included."""

    def __init__(
        self, library: Linear, num_rows: int, weights: str, shape: tuple[int, int], dtype: torch.dtype, form: str
    ) -> None:
        super().__init__(library, weights, num_rows, num_rows, shape, dtype)
        num_outputs, num_inputs = shape
        self.activation = next((word for word in form.split() if word in MODULES), None)
        self.x.tensor.mul_(3.0)
        self.bias = Buffer(num_outputs, dtype=dtype)
        self.bias.tensor.normal_()
        fields = {"bias": self.bias.address}
        self.norm_weight = self.residual = None
        if "norm" in form:
            self.norm_weight = Buffer(num_inputs, dtype=torch.float32 if "float" in form else dtype)
            self.norm_weight.tensor.uniform_(0.5, 1.5)
            fields |= {
                "norm_weight": self.norm_weight.address,
                "norm_epsilon": EPSILON,
                "float_norm_weight": "float" in form,
            }
        if "residual" in form:
            self.residual = Buffer(num_rows, num_outputs, dtype=dtype)
            self.residual.tensor.normal_()
            fields["residual"] = self.residual.address
        if self.activation is not None:
            self.y = Buffer(num_rows, num_outputs // 2, dtype=dtype)
            fields |= {"is_gated": True, "activation": ACTIVATIONS[self.activation]}
        self.params = LinearParams(**{**self.common, "y": self.y.address, **fields})
        self.workspace = Buffer(max(16, library.workspace_bytes(self.params)), dtype=torch.uint8)

    def buffers(self) -> tuple[Buffer, ...]:
        more = (self.norm_weight, self.residual)
        return (*super().buffers(), self.bias, *(buffer for buffer in more if buffer is not None))

    def scratch(self) -> tuple[Buffer, ...]:
        return (self.workspace,)

    def _normed(self, kind: torch.dtype) -> torch.Tensor:
        """x, normalised if there is a norm. kind: float64, or what a model rounds to."""
        x = self.x.tensor.to(kind)
        if self.norm_weight is None:
            return x
        wide, weight = x.to(torch.promote_types(kind, torch.float32)), self.norm_weight.tensor
        if kind == torch.float64:
            weight = weight.double()
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
        return (normal.to(weight.dtype) * weight).to(kind)

    def _computed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x, weight, self.bias.tensor.to(x.dtype))
        if self.activation is not None:
            gate, up = y.chunk(2, -1)
            return MODULES[self.activation](gate) * up
        return y if self.residual is None else y + self.residual.tensor.to(x.dtype)

    def float64(self) -> np.ndarray:
        return self._computed(self._normed(torch.float64), self.dense()).cpu().numpy()

    def rounded(self) -> torch.Tensor:
        return self._computed(self._normed(torch.float64).to(self.dtype).double(), self.dense()).to(self.dtype)

    def torch(self) -> torch.Tensor:
        return self._computed(self._normed(self.dtype), self.half_weight())


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return library_for_gpu(
        "SINKEXPORT_LINEAR", Linear, lambda: build(Linear, tmp_path_factory.mktemp("linear"), "native")
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("weights", "shape"),
    list(itertools.product(WEIGHTS, SHAPES)),
    ids=[f"{weights}-{n}x{k}" for weights, (n, k) in itertools.product(WEIGHTS, SHAPES)],
)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_error_is_at_most_twice_pytorchs(library, record_property, num_rows, weights, shape, form, dtype):
    check_error(Layer(library, num_rows, weights, shape, dtype, form), record_property)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("num_rows", [1, 3, 8, 16, 64])
@pytest.mark.parametrize("form", ["norm silu", "norm residual"])
def test_repeats_to_the_bit(library, form, num_rows, weights):
    check_repeats(Layer(library, num_rows, weights, (1152, 576), torch.float16, form))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("num_rows", [1, 3, 8, 16, 64])
@pytest.mark.parametrize("form", ["norm silu", "norm residual"])
def test_replays_in_a_graph_on_new_inputs(library, form, num_rows, weights):
    problem = Layer(library, num_rows, weights, (1536, 1488), torch.bfloat16, form)
    check_replays(problem, problem.x.tensor.normal_)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("num_rows", [1, 5, 16, 64])
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("form", ["norm", "norm residual"])
def test_each_launch_waits_for_the_one_before(library, form, num_rows, captured, weights):
    layers = [Layer(library, num_rows, weights, (768, 768), torch.float16, form) for _ in range(24)]
    for layer in layers:
        layer.params.constant_weight = True
        layer.workspace = layers[0].workspace
    check_chain(layers, num_rows, 768, captured, before=lambda layer: None)
