"""The linear by whole warpgroups on a GPU of compute capability 9.0: many tokens, tiles cut short, splits, epilogues.

SINKEXPORT_LINEAR: a library that holds capi/linear.cpp, compiled with ANY_SIZE; without it one is compiled for this
machine's GPU. On another GPU the same cases run by the kernels that it has.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from plugins.capi.kernels import Linear
from tests.plugins.gpu_tests import library_for_gpu, needs_gpu
from tests.plugins.linear_library import build
from tests.plugins.matmul_problem import check_chain, check_error, check_repeats, check_replays
from tests.plugins.test_linear_cuda import OneMatrix
from tests.plugins.test_linear_layer_cuda import Layer

pytestmark = needs_gpu("SINKEXPORT_LINEAR")

ANY_SIZE = "-DSINKEXPORT_WIDE_PRODUCTS=1"  # small matmuls, too

# The last output tile and the last chunk of k cut short; one of all; outputs that are no multiple of 8, of one half of
# a cluster; k split; tiles of 256 tokens; more tiles than multiprocessors.
SHAPES = [(32, 16), (96, 592), (99, 1488), (520, 4112), (1152, 576), (4104, 1040)]
WEIGHTS = ("int8", "half", "int4-32", "int4-64", "int4-128z", "int4-32z")
NUM_ROWS = [65, 128, 200, 256, 300, 777]
FORMS = ("residual", "silu", "gelu", "gelu_tanh", "norm residual", "norm silu")
TYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return library_for_gpu(
        "SINKEXPORT_LINEAR", Linear, lambda: build(Linear, tmp_path_factory.mktemp("linear"), "native", ANY_SIZE)
    )


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_error_is_at_most_twice_pytorchs(library, record_property, num_rows, weights, dtype):
    for i, shape in enumerate(SHAPES):
        check_error(OneMatrix(library, num_rows, weights, shape, dtype, bias=i % 2 == 0), record_property)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_error_with_2048_tokens(library, record_property, weights):
    check_error(OneMatrix(library, 2048, weights, (1152, 576), torch.float16, bias=True), record_property)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_rows", [65, 200, 300])
def test_error_with_what_stands_beside_it(library, record_property, num_rows, form, weights, dtype):
    for shape in ((32, 16), (288, 592), (1152, 2048), (4128, 1040)):
        check_error(Layer(library, num_rows, weights, shape, dtype, form), record_property)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_exact_where_floats_are(library, weights):
    """Small integers: every product and sum is exact, so every weight must meet its own input, in all tiles."""
    for num_rows, shape in itertools.product(NUM_ROWS, SHAPES):
        problem = OneMatrix(library, num_rows, weights, shape, torch.float16, False)
        problem.use_small_integers(0.25)
        np.testing.assert_array_equal(problem.run().double().cpu().numpy(), problem.float64())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("weights", ["int4-32z", "int4-64", "int4-128z"])
def test_every_int4_value_is_exact(library, weights, dtype):
    problem = OneMatrix(library, 128, weights, (256, 128), dtype, False)
    problem.x.tensor.copy_(torch.eye(128))
    problem.use_integers((torch.arange(256)[:, None] + 7 * torch.arange(128)) % 16, scale=2.0)
    assert torch.equal(problem.run().T.double(), problem.dense())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_int8_value_is_exact(library, dtype):
    problem = OneMatrix(library, 80, "int8", (256, 80), dtype, False)
    problem.x.tensor.copy_(torch.eye(80))
    values = (torch.arange(256)[:, None] + 37 * torch.arange(80)) % 256 - 128
    problem.weight.tensor.copy_(values)
    problem.scale.tensor.fill_(1.0)
    assert torch.equal(problem.run().T.cpu().long(), values)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("num_rows", "shape"), [(128, (576, 4112)), (1000, (4096, 1024))])
def test_repeats_to_the_bit_and_replays_in_a_graph(library, num_rows, shape, weights):
    problem = OneMatrix(library, num_rows, weights, shape, torch.float16, True)
    check_repeats(problem)
    check_replays(problem, problem.x.tensor.normal_)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("num_rows", [128, 512])
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("form", ["", "norm residual"])
def test_each_launch_waits_for_the_one_before(library, form, num_rows, captured, weights):
    layers = [Layer(library, num_rows, weights, (768, 768), torch.float16, form) for _ in range(12)]
    for layer in layers:
        layer.params.constant_weight = True
        layer.workspace = layers[0].workspace
    check_chain(layers, num_rows, 768, captured, before=lambda layer: None)
