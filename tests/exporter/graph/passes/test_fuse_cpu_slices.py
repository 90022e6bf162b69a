"""fuse_cpu_slices: parts of a value that Slices cut, as one Split."""

from __future__ import annotations

import pytest
from sinkexport.graph.passes.fuse_cpu_slices import FuseCpuSlices

from tests.exporter.graph.passes.pass_checks import check_left_alone, check_same_results, kinds, parsed

CONSTANTS = (
    "int64[1] zero = {0}, int64[1] three = {3}, int64[1] five = {5}, int64[1] far = {9223372036854775807}, "
    "int64[1] last = {-1}, int64[1] second = {1}, int64[1] one = {1}, int64[1] two = {2}"
)
CUT = "a = Slice (x, zero, three, last, one) b = Slice (x, three, {}) y = Concat <axis = -1> ({}, a)"


@pytest.mark.parametrize(
    "body",
    [
        CUT.format("far, last, one", "b"),
        "c = Slice (x, five, far, second) " + CUT.format("five, last, one", "c, b"),
    ],
    ids=["two parts", "three in another order"],
)
def test_parts(body: str) -> None:
    model = parsed(body, "float[2, 7] x", "float[2, 7] y", CONSTANTS)
    check_same_results(model, FuseCpuSlices())
    assert kinds(model) == ["Concat", "Split"]


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        (CUT.format("five, last, one", "b"), "float[2, 5] y"),
        (CUT.format("far, last, two", "b"), "float[2, 5] y"),
        ("a = Slice (x, zero, one, zero) b = Slice (x, one, far, zero) y = Concat <axis = 0> (b, a)", "float[2, 7] y"),
        (CUT.format("far, last, one", "x"), "float[2, 10] y"),
        ("y = Slice (x, zero, far, last)", "float[2, 7] y"),
    ],
    ids=["a gap", "steps", "another axis", "another reader", "one slice"],
)
def test_left_alone(body: str, outputs: str) -> None:
    check_left_alone(parsed(body, "float[2, 7] x", outputs, CONSTANTS), FuseCpuSlices())
