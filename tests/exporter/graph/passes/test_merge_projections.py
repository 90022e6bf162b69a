"""merge_projections: matmuls of one input become one, with a Split."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from sinkexport.graph.graph_pass import PassContext
from sinkexport.graph.passes.merge_projections import MergeProjections
from sinkexport.targets import CPU, ONNX

from tests.exporter.graph.passes.pass_checks import (
    check_left_alone,
    check_same_results,
    kinds,
    numbers,
    parsed,
    written,
)
from tests.exporter.graph.passes.plans import SimplePlan, context

WEIGHTS = ", ".join(
    [
        written("q", numbers(4, 6)),
        written("k", numbers(4, 2, seed=1)),
        written("b", numbers(6, seed=2)),
        written("c", numbers(2, seed=3)),
    ]
)
PLAIN = "y = MatMul (x, q) z = MatMul (x, k)"
BIASED = "s = MatMul (x, q) y = Add (s, b) t = MatMul (x, k) z = Add (c, t)"


def projections(body: str) -> ir.Model:
    return parsed(body, "float[2, 3, 4] x, float[2, 3, 4] x2", "float[2, 3, 6] y, float[2, 3, 2] z", WEIGHTS)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (PLAIN, ["MatMul", "Split"]),
        (BIASED, ["Add", "MatMul", "Split"]),
        ("s = MatMul (x, q) y = Add (s, b) z = MatMul (x, k)", ["Add", "MatMul", "Split"]),  # the bias stays outside
    ],
    ids=["plain", "biases", "one bias"],
)
def test_joined(body: str, expected: list[str]) -> None:
    model = projections(body)
    check_same_results(model, MergeProjections())
    assert kinds(model) == expected
    (matmul,) = (node for node in model.graph if node.op_type == "MatMul")
    assert matmul.inputs[1].name == "q+k"


def test_only_weights_of_one_kind_are_joined() -> None:
    check_left_alone(projections(PLAIN), MergeProjections(context(SimplePlan(keep=("k",)))))
    check_same_results(projections(PLAIN), MergeProjections(context()))


def test_for_the_cpu_library_attention_has_a_matmul_of_its_own() -> None:
    def model() -> ir.Model:
        constants = ", ".join(written(name, numbers(4, 6, seed=i)) for i, name in enumerate("qkgu"))
        attention = "a = Reshape (p, shape) n = ai.sinkexport.SinkAttention (a, r)"
        outputs = "float[2, 3, 6] v, float[2, 3, 6] w, float[2, 3, 2, 3] n"
        shape = "shape = Constant <value = int64[4] {2, 3, 2, 3}> () "
        return parsed(
            f"{shape} p = MatMul (x, q) r = MatMul (x, k) {attention} v = MatMul (x, g) w = MatMul (x, u)",
            "float[2, 3, 4] x",
            outputs,
            constants,
        )

    for target, expected in ((CPU, ["g+u", "q+k"]), (ONNX, ["q+k+g+u"])):
        joined = model()
        assert MergeProjections(PassContext(target))(joined).modified
        names = [node.inputs[1].name for node in joined.graph if node.op_type == "MatMul"]
        assert sorted(names) == expected
        check_left_alone(joined, MergeProjections(PassContext(target)))


@pytest.mark.parametrize(
    "body", ["y = MatMul (x, q) z = MatMul (x2, k)", PLAIN + " u = MatMul (x, q)"], ids=["two inputs", "shared weight"]
)
def test_left_alone(body: str) -> None:
    check_left_alone(projections(body), MergeProjections())
