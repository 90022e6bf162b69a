"""The linear compiles, and what it checks on the host it checks on any machine."""

from __future__ import annotations

import pytest

from plugins.capi.header import DTYPES, WEIGHT_TYPES
from plugins.capi.kernels import Linear, LinearParams
from tests.plugins.compiler import needs_nvcc
from tests.plugins.linear_library import build
from tests.plugins.refusals import INVALID_VALUE, assert_refused

pytestmark = [needs_nvcc, pytest.mark.slow]

POINTERS = ("x", "weight", "scale", "bias", "y")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Linear:
    return build(Linear, tmp_path_factory.mktemp("linear"), "sm_90")


def params(**changes: int) -> LinearParams:
    """Valid on the host, where nobody follows the pointers: 1 GiB apart from each other."""
    values = {"num_rows": 3, "num_inputs": 64, "num_outputs": 33, "dtype": DTYPES["bfloat16"]}
    addresses = {name: (i + 1) << 30 for i, name in enumerate(POINTERS)}
    return LinearParams(**{**values, **addresses, **changes})


HALF = {"weight_type": WEIGHT_TYPES["half"], "scale": 0}
INT4 = {
    "weight_type": WEIGHT_TYPES["int4"],
    "scale": 0,
    "block_size": 32,
    "block_scale": 6 << 30,
    "zero_points": 7 << 30,
}
NORM = {"norm_weight": 9 << 30, "norm_epsilon": 1e-5}
GATE = {"is_gated": True, "activation": 2, "num_outputs": 64}


def test_what_can_be_launched(library):
    for changes in ({}, {"bias": 0}, {"num_rows": 1 << 16}, {"num_inputs": 16}, {"num_outputs": 1}, {"dtype": 0}):
        assert library.problem(params(**changes)) is None
        assert library.problem(params(**changes, **HALF)) is None
    assert library.problem(params(**HALF, num_inputs=8)) is None
    for changes in (NORM, {**NORM, "float_norm_weight": True}, {"residual": 8 << 30}, GATE, {**NORM, **GATE}):
        assert library.problem(params(**changes)) is None
    for changes in ({}, {"zero_points": 0}, {"block_size": 64}, {"block_size": 128}, {"num_inputs": 8}):
        assert library.problem(params(**INT4 | changes)) is None


REFUSED = [
    ({"num_rows": 0}, "num_rows: received 0, expected 1 .. 65536"),
    ({"num_rows": -1}, "num_rows: received -1, expected 1 .. 65536"),
    ({"num_rows": 65537}, "num_rows: received 65537, expected 1 .. 65536"),
    ({"num_inputs": 72}, "num_inputs: received 72, expected a multiple of 16 in 16 .. 2097152; pad x and weight with"),
    ({"num_inputs": 0}, "num_inputs: received 0, expected a multiple of 16 in"),
    ({"num_outputs": 0}, "num_outputs: received 0, expected 1 .. 2097152"),
    ({"dtype": 2}, "dtype: received 2, expected 0 (float16) or 1 (bfloat16)"),
    ({"weight_type": 3}, "weight_type: received 3, expected 0 (int8), 1 (half) or 2 (int4)"),
    ({**NORM, "norm_epsilon": 0.0}, "epsilon: received 0, expected a finite number > 0"),
    ({"norm_epsilon": 1e-5}, "float_norm_weight, norm_epsilon: received one of them, expected none without"),
    ({**GATE, "num_outputs": 48}, "num_outputs: received 48, expected a multiple of 32 with a gate"),
    ({**GATE, "activation": 3}, "activation: received 3, expected 0 (silu), 1 (gelu) or 2 (gelu by tanh)"),
    ({"activation": 1}, "activation: received 1, expected 0 without a gate"),
    ({**GATE, "residual": 8 << 30}, "residual: received a pointer, expected null with a gate"),
    ({"residual": 5 << 30}, "y: overlaps residual, expected memory of its own"),
    ({**HALF, "num_inputs": 68}, "num_inputs: received 68, expected a multiple of 8 in 8 .. 2097152; pad x and weight"),
    ({**HALF, "num_inputs": 0}, "num_inputs: received 0, expected a multiple of 8 in"),
    ({**HALF, "scale": 3 << 30}, "scale: received a pointer, expected null with half weights"),
    ({**INT4, "num_inputs": 68}, "num_inputs: received 68, expected a multiple of 8 in 8 .. 2097152; pad x and weight"),
    ({**INT4, "block_size": 16}, "block_size: received 16, expected 32, 64 or 128"),
    ({**INT4, "block_size": 0}, "block_size: received 0, expected 32, 64 or 128"),
    ({**INT4, "scale": 3 << 30}, "scale: received a pointer, expected null with int4 weights"),
    ({**INT4, "block_scale": 0}, "block_scale: received null, expected a device pointer"),
    ({**INT4, "zero_points": (1 << 40) + 8}, "zero_points: received 0x10000000008, expected a device pointer that is"),
    ({"block_size": 32}, "block_size, block_scale, zero_points: received one of them, expected none but with int4"),
    ({**HALF, "zero_points": 7 << 30}, "block_size, block_scale, zero_points: received one of them, expected none but"),
    ({**INT4, "y": (2 << 30) + 3 * 512 - 16}, "y: overlaps weight, expected memory of its own"),
    ({**INT4, "y": (6 << 30) + 3 * 2 * 32 - 16}, "y: overlaps block_scale, expected memory of its own"),
    ({**INT4, "y": (7 << 30) + 3 * 2 * 16 - 16}, "y: overlaps zero_points, expected memory of its own"),
    ({**HALF, "weight": 0}, "weight: received null, expected a device pointer"),
    *(({name: 0}, f"{name}: received null, expected a device pointer") for name in POINTERS if name != "bias"),
    ({"weight": 0, "bias": 0}, "weight: received null, expected a device pointer"),
    *(
        ({name: (1 << 40) + 8}, f"{name}: received 0x10000000008, expected a device pointer that is a multiple of 16")
        for name in POINTERS
    ),
    ({"y": 1 << 30}, "y: overlaps x, expected memory of its own"),
    ({"y": (1 << 30) + 16 * 23}, "y: overlaps x, expected memory of its own"),
    ({"y": (2 << 30) - 16}, "y: overlaps weight, expected memory of its own"),
    ({**HALF, "y": (2 << 30) + 33 * 64 * 2 - 16}, "y: overlaps weight, expected memory of its own"),
    ({"y": (4 << 30) + 64}, "y: overlaps bias, expected memory of its own"),
]


@pytest.mark.parametrize(("changes", "expected"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_what_is_refused_and_why(library, changes, expected):
    assert_refused(library, params(**changes), expected)


def test_workspace_holds_the_partial_sums_of_all_splits(library):
    for num_rows in (1, 16):
        assert library.workspace_bytes(params(num_rows=num_rows)) == 0
    assert library.workspace_bytes(params(num_rows=0)) == 0
    few_outputs = params(num_rows=64, num_inputs=4096, num_outputs=256)
    half = params(num_rows=64, num_inputs=4096, num_outputs=256, **HALF)
    assert library.workspace_bytes(half) == library.workspace_bytes(few_outputs)
    size = library.workspace_bytes(few_outputs)
    assert size >= 2 * 64 * 256 * 4
    assert size % (64 * 256 * 4) == 0
    assert library.launch(few_outputs, workspace=0) == INVALID_VALUE
    assert library.launch(few_outputs, workspace=(1 << 40) + 8) == INVALID_VALUE
