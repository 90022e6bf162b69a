"""fold_constants: shape arithmetic is done now, and every value has a shape."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from sinkexport.graph.passes.fold_constants import SMALL_ELEMENTS, FoldConstants

from tests.exporter.graph.passes.pass_checks import check_left_alone, check_same_results, kinds, parsed


def without_shapes(model: ir.Model) -> ir.Model:
    """A graph whose values have no shapes, as translations of one torch operator into several nodes leave them."""
    for node in model.graph:
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = None
                output.type = None
    return model


def test_shape_arithmetic_becomes_a_constant() -> None:
    model = parsed(
        "s = Shape (x) last = Gather (s, two) pair = Concat <axis = 0> (six, last) y = Reshape (x, pair)",
        "float[2, 3, 4] x",
        "float[6, 4] y",
        "int64[1] two = {2}, int64[1] six = {6}",
    )
    check_same_results(model, FoldConstants())
    assert kinds(model) == ["Reshape"]
    (node,) = model.graph
    assert node.inputs[1].const_value.numpy().tolist() == [6, 4]


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ("v = Mul (x, x) y = Neg (v)", (2, 4)),
        ("v = MatMul (x, k) y = MatMul (v, k2)", (2, 3)),
        ("v = Unsqueeze (x, one) y = Squeeze (v, one)", (2, 1, 4)),
        ("v = Less (x, x) y = Cast <to = 1> (v)", (2, 4)),
    ],
    ids=["elementwise", "matmul", "unsqueeze", "comparison"],
)
def test_missing_shapes_are_completed(body: str, shape: tuple[int, ...]) -> None:
    model = without_shapes(
        parsed(body, "float[2, 4] x, float[4, 3] k, float[3, 4] k2", "float[2, 4] y", "int64[1] one = {1}")
    )
    assert FoldConstants()(model).modified
    value = model.graph[0].outputs[0]
    assert tuple(value.shape) == shape
    assert value.dtype == (ir.DataType.BOOL if "Less" in body else ir.DataType.FLOAT)
    check_left_alone(model, FoldConstants())


def test_weights_are_not_folded() -> None:
    """What is larger than shapes and indices stays, or a second copy of weights would be held."""
    size = SMALL_ELEMENTS + 1
    model = parsed("v = Neg (w) y = Add (x, v)", f"float[{size}] x", f"float[{size}] y", f"float[{size}] w")
    weight = next(value for node in model.graph for value in node.inputs if value is not None and value.name == "w")
    weight.const_value = ir.LazyTensor(
        lambda: pytest.fail("read"), dtype=ir.DataType.FLOAT, shape=ir.Shape([size]), name="w"
    )
    model.graph.register_initializer(weight)
    check = FoldConstants()(model)
    assert not check.modified
    assert kinds(model) == ["Add", "Neg"]


def test_left_alone() -> None:
    check_left_alone(parsed("v = Neg (x) y = Exp (v)", "float[3] x", "float[3] y"), FoldConstants())
