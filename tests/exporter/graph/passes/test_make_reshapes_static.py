"""make_reshapes_static: every view is at most one Reshape with a constant shape."""

from __future__ import annotations

import pytest
from sinkexport.graph.passes.make_reshapes_static import MakeReshapesStatic

from tests.exporter.graph.passes.pass_checks import check_left_alone, check_same_results, kinds, parsed

CONSTANTS = "int64[2] flat = {6, 4}, int64[3] back = {2, 3, 4}, int64[1] one = {1}, int64[4] wide = {5, 2, 3, 4}"


@pytest.mark.parametrize(
    ("body", "shape", "expected"),
    [
        ("v = Reshape (x, flat) w = Neg (v) y = Reshape (w, back)", "2, 3, 4", ["Neg", "Reshape", "Reshape"]),
        ("v = Reshape (x, flat) w = Reshape (v, back) y = Neg (w)", "2, 3, 4", ["Neg"]),  # nothing is left of both
        ("v = Unsqueeze (x, one) w = Squeeze (v, one) y = Neg (w)", "2, 3, 4", ["Neg"]),
        (
            "v = Unsqueeze (x, one) w = Transpose <perm = [1, 0, 2, 3]> (v) y = Neg (w)",
            "1, 2, 3, 4",
            ["Neg", "Reshape"],
        ),
        ("v = Flatten <axis = 2> (x) y = Neg (v)", "6, 4", ["Neg", "Reshape"]),
        ("v = Identity (x) y = Expand (v, back)", "2, 3, 4", ["Reshape"]),  # an output stays a node
    ],
    ids=["kept", "there and back", "unit axis", "moved unit axis", "flatten", "output"],
)
def test_views(body: str, shape: str, expected: list[str]) -> None:
    model = parsed(body, "float[2, 3, 4] x", f"float[{shape}] y", CONSTANTS)
    check_same_results(model, MakeReshapesStatic())
    assert kinds(model) == expected


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ("y = Transpose <perm = [1, 0, 2]> (x)", "3, 2, 4"),
        ("y = Expand (x, wide)", "5, 2, 3, 4"),
        ("y = Neg (x)", "2, 3, 4"),
    ],
    ids=["transpose", "expand", "no view"],
)
def test_what_moves_data_is_left_alone(body: str, shape: str) -> None:
    check_left_alone(parsed(body, "float[2, 3, 4] x", f"float[{shape}] y", CONSTANTS), MakeReshapesStatic())
