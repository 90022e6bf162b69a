"""Norms and gates compile, refuse bad parameters, and give what they should: their kernels run on the host here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from plugins.capi.header import DTYPES
from plugins.capi.kernels import GatedActivationParams, RmsNormParams
from tests.plugins.compiler import needs_nvcc
from tests.plugins.norm_and_gate_cases import GATE_CASES, NORM_CASES, GateCase, NormCase
from tests.plugins.norm_and_gate_library import NormAndGate, build, build_on_host
from tests.plugins.refusals import assert_refused

pytestmark = [needs_nvcc, pytest.mark.slow]  # compiles for half a minute


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> NormAndGate:
    return build(tmp_path_factory.mktemp("norm_and_gate"), "sm_90")


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> NormAndGate:
    return build_on_host(tmp_path_factory.mktemp("on_host"))


def norm(**changes: Any) -> RmsNormParams:
    """Valid on the host, where nobody follows the pointers: 1 GiB apart from each other."""
    values = {"num_rows": 3, "row_length": 64, "dtype": DTYPES["bfloat16"], "epsilon": 1e-6}
    addresses = {name: (i + 1) << 30 for i, name in enumerate(("x", "weight", "residual", "y", "sum"))}
    return RmsNormParams(**{**values, **addresses, **changes})


def gate(**changes: Any) -> GatedActivationParams:
    values = {"num_rows": 3, "width": 64, "row_stride": 128, "dtype": DTYPES["float16"], "activation": 2}
    addresses = {name: (i + 1) << 30 for i, name in enumerate(("gate", "up", "out"))}
    return GatedActivationParams(**{**values, **addresses, **changes})


def test_what_can_be_launched(library: NormAndGate) -> None:
    for changes in ({}, {"residual": 0, "sum": 0}, {"row_length": 8}, {"row_length": 32768}, {"float_weight": True}):
        assert library.norm.problem(norm(**changes)) is None
    for changes in ({}, {"row_stride": 64}, {"width": 8}, {"activation": 0}):
        assert library.gate.problem(gate(**changes)) is None


REFUSED_NORMS = [
    ({"num_rows": 0}, "num_rows: received 0, expected at least 1"),
    ({"row_length": 12}, "row_length: received 12, expected a multiple of 8 in 8 .. 32768"),
    ({"row_length": 0}, "row_length: received 0, expected a multiple of 8"),
    ({"row_length": 32776}, "row_length: received 32776, expected a multiple of 8"),
    ({"dtype": 2}, "dtype: received 2, expected 0 (float16) or 1 (bfloat16)"),
    ({"epsilon": 0.0}, "epsilon: received 0, expected a finite number > 0"),
    ({"epsilon": float("nan")}, "epsilon: received nan, expected a finite number > 0"),
    ({"residual": 0}, "residual, sum: received one of them, expected both or neither"),
    ({"sum": 0}, "residual, sum: received one of them, expected both or neither"),
    *(({name: 0}, f"{name}: received null, expected a device pointer") for name in ("x", "weight", "y")),
    *(
        ({name: (1 << 40) + 8}, f"{name}: received 0x10000000008, expected a device pointer that is a multiple of 16")
        for name in ("x", "weight", "residual", "y", "sum")
    ),
]
REFUSED_GATES = [
    ({"num_rows": -1}, "num_rows: received -1, expected at least 1"),
    ({"width": 12}, "width: received 12, expected a multiple of 8 in 8 .. 2097152"),
    ({"width": 1 << 22, "row_stride": 1 << 22}, "width: received 4194304, expected a multiple of 8"),
    ({"row_stride": 56}, "row_stride: received 56, expected a multiple of 8 of at least width (64)"),
    ({"row_stride": 68}, "row_stride: received 68, expected a multiple of 8 of at least width (64)"),
    ({"dtype": -1}, "dtype: received -1, expected 0 (float16) or 1 (bfloat16)"),
    ({"activation": 3}, "activation: received 3, expected 0 (silu), 1 (gelu) or 2 (gelu by tanh)"),
    *(({name: 0}, f"{name}: received null, expected a device pointer") for name in ("gate", "up", "out")),
    ({"up": (1 << 40) + 2}, "up: received 0x10000000002, expected a device pointer that is a multiple of 16"),
]


@pytest.mark.parametrize(("changes", "expected"), REFUSED_NORMS, ids=str)
def test_norms_that_are_refused_and_why(library: NormAndGate, changes: dict[str, Any], expected: str) -> None:
    assert_refused(library.norm, norm(**changes), expected)


@pytest.mark.parametrize(("changes", "expected"), REFUSED_GATES, ids=str)
def test_gates_that_are_refused_and_why(library: NormAndGate, changes: dict[str, Any], expected: str) -> None:
    assert_refused(library.gate, gate(**changes), expected)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The host's memory, which must lie as the device's does."""
    assert tensor.data_ptr() % 16 == 0
    return tensor


@pytest.mark.parametrize("case", NORM_CASES, ids=str)
def test_norms_on_the_host(on_host: NormAndGate, case: NormCase) -> None:
    case.check(on_host, aligned)


@pytest.mark.parametrize("case", GATE_CASES, ids=str)
def test_gates_on_the_host(on_host: NormAndGate, case: GateCase) -> None:
    case.check(on_host, aligned)
