"""fuse_cpu_norms: RMS norms and layer norms in front of matmuls by the CPU library's nodes."""

from __future__ import annotations

import pytest
from sinkexport.graph.passes.fuse_cpu_norms import FuseCpuNorms

from tests.exporter.graph.passes.cpu_graphs import DEPTH, WIDTH, linear_graph
from tests.exporter.graph.passes.pass_checks import check_left_alone, check_same_results, kinds

NORM = "n = RMSNormalization <axis = -1, epsilon = 0.001> (x, g)"
LAYER_NORM = "n = LayerNormalization <axis = -1, epsilon = 0.01> (x, g, h)"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (f"{NORM} y = MatMul (n, W)", ["FloatLinear"]),
        (f"{LAYER_NORM} y = MatMul (n, W)", ["FloatLinear"]),
        ("n = LayerNormalization <axis = 2> (x, g) y = MatMul (n, W)", ["FloatLinear"]),
        (
            f"{NORM} m = Reshape (n, shape) t = MatMul (m, W) y = Reshape (t, back)",
            ["FloatLinear", "Reshape", "Reshape"],
        ),
    ],
    ids=["plain", "a layer norm", "a layer norm without bias", "through a view"],
)
def test_norms(body: str, expected: list[str]) -> None:
    head = f"shape = Constant <value = int64[2] {{6, {DEPTH}}}> () "
    head += f"back = Constant <value = int64[3] {{2, 3, {WIDTH}}}> () "
    model = linear_graph(head * ("shape" in body) + body)
    check_same_results(model, FuseCpuNorms(), rtol=1e-5)
    assert [kind for kind in kinds(model) if kind != "Constant"] == expected


@pytest.mark.parametrize(
    "body",
    [
        f"{NORM} s = MatMul (n, W) m = ReduceSum <keepdims = 1> (n) y = Add (s, m)",
        "n = RMSNormalization <axis = 1, epsilon = 0.001> (x, gg) y = MatMul (n, W)".replace("gg", "x"),
        f"{LAYER_NORM} s = MatMul (n, W) m = ReduceSum <keepdims = 1> (n) y = Add (s, m)",
        "y = MatMul (x, W)",
    ],
)
def test_left_alone(body: str) -> None:
    check_left_alone(linear_graph(body), FuseCpuNorms())
