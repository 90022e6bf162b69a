"""The matmuls by chosen matrices compile, and what they check on the host they check on any machine."""

from __future__ import annotations

import pytest

from plugins.capi.header import DTYPES, WEIGHT_TYPES
from plugins.capi.kernels import ExpertLinear, ExpertLinearParams
from tests.plugins.compiler import needs_nvcc
from tests.plugins.linear_library import build
from tests.plugins.refusals import assert_refused

pytestmark = [needs_nvcc, pytest.mark.slow]  # compiles for half a minute

POINTERS = ("picks", "x", "weight", "scale", "y")
HALF = {"weight_type": WEIGHT_TYPES["half"], "scale": 0}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ExpertLinear:
    return build(ExpertLinear, tmp_path_factory.mktemp("expert_linear"), "sm_90")


def params(**changes: int) -> ExpertLinearParams:
    """Valid on the host, where nobody follows the pointers: 1 GiB apart from each other."""
    values = {
        "num_experts": 5,
        "num_picks": 6,
        "num_rows": 3,
        "num_inputs": 64,
        "num_outputs": 33,
        "dtype": DTYPES["bfloat16"],
        "weight_type": WEIGHT_TYPES["int8"],
    }
    addresses = {name: (i + 1) << 30 for i, name in enumerate(POINTERS)}
    return ExpertLinearParams(**{**values, **addresses, **changes})


def test_what_can_be_launched(library):
    for changes in ({}, {"num_experts": 512, "num_picks": 2048, "num_rows": 1}, {"num_rows": 6}, {"num_outputs": 1}):
        assert library.problem(params(**changes)) is None
        assert library.problem(params(**changes, **HALF)) is None
    assert library.problem(params(**HALF, num_inputs=8)) is None


REFUSED = [
    ({"num_experts": 0}, "num_experts: received 0, expected 1 .. 512"),
    ({"num_experts": 513}, "num_experts: received 513, expected 1 .. 512"),
    ({"num_picks": 0}, "num_picks: received 0, expected 1 .. 2048"),
    ({"num_picks": 2049}, "num_picks: received 2049, expected 1 .. 2048"),
    ({"num_rows": 0}, "num_rows: received 0, expected a divisor of num_picks, 6"),
    ({"num_rows": 4}, "num_rows: received 4, expected a divisor of num_picks, 6"),
    ({"num_inputs": 72}, "num_inputs: received 72, expected a multiple of 16 in 16 .. 2097152; pad x and weight with"),
    ({**HALF, "num_inputs": 68}, "num_inputs: received 68, expected a multiple of 8 in 8 .. 2097152; pad x and weight"),
    ({"num_outputs": 0}, "num_outputs: received 0, expected 1 .. 2097152"),
    ({"dtype": 2}, "dtype: received 2, expected 0 (float16) or 1 (bfloat16)"),
    ({"weight_type": 3}, "weight_type: received 3, expected 0 (int8), 1 (half) or 2 (int4)"),
    ({**HALF, "scale": 3 << 30}, "scale: received a pointer, expected null with half weights"),
    *(({name: 0}, f"{name}: received null, expected a device pointer") for name in POINTERS),
    *(
        ({name: (1 << 40) + 8}, f"{name}: received 0x10000000008, expected a device pointer that is a multiple of 16")
        for name in POINTERS
    ),
    ({"y": (1 << 30) + 16}, "y: overlaps picks, expected memory of its own"),
    ({"y": (2 << 30) + 3 * 64 * 2 - 16}, "y: overlaps x, expected memory of its own"),
    ({"y": (3 << 30) + 5 * 33 * 64 - 16}, "y: overlaps weight, expected memory of its own"),
    ({"y": (4 << 30) + 16 * 41}, "y: overlaps scale, expected memory of its own"),
]


@pytest.mark.parametrize(("changes", "expected"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_what_is_refused_and_why(library, changes, expected):
    assert_refused(library, params(**changes), expected)
