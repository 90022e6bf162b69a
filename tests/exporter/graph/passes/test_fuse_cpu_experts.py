"""fuse_cpu_experts: biases, gates and weighted sums of MoE experts by the CPU library's nodes of their matmuls."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from sinkexport.graph.builder import Builder
from sinkexport.graph.cpu_nodes import ExpertLinear
from sinkexport.graph.edit import constant
from sinkexport.graph.passes.fuse_cpu_additions import FuseCpuAdditions
from sinkexport.graph.passes.fuse_cpu_experts import FuseCpuExperts
from sinkexport.graph.passes.use_cpu_experts import UseCpuExperts

from tests.exporter.graph.passes.attention_graphs import value
from tests.exporter.graph.passes.expert_graphs import E, K, M, expert_graph
from tests.exporter.graph.passes.pass_checks import check_left_alone, check_same_results, kinds, numbers

TOKENS, TOP_K = 2, 3
PICKS = TOKENS * TOP_K
FLOAT = ir.DataType.FLOAT


def graph() -> tuple[ir.Model, Builder, ir.Value]:
    """A matmul of x [2, K] by chosen matrices in the library's form, and its result [6, M]."""
    model = expert_graph(numbers(E, M, K), (TOKENS, K), PICKS, is_transposed=False, in_place=True)
    UseCpuExperts()(model)
    return model, Builder(model.graph), model.graph.outputs[0]


def finished(model: ir.Model, b: Builder, y: ir.Value) -> ir.Model:
    """The same with another result."""
    for node in b.nodes:
        model.graph.append(node)
    y.name = "z"
    model.graph.outputs[0] = y
    return model


def inputs(**more: np.ndarray) -> dict[str, np.ndarray]:
    return {"x": numbers(TOKENS, K, seed=1), "picks": np.array([4, 0, 4, 2, 1, 3]), **more}


def linear_of(model: ir.Model) -> ExpertLinear:
    (node,) = (node for node in model.graph if node.op_type == "FloatExpertLinear")
    return ExpertLinear.of(node)


def biased(model: ir.Model, b: Builder, y: ir.Value) -> ir.Value:
    table = constant(model.graph, numbers(E, M, seed=2), "table")
    picked = b.op("Gather", [table, model.graph.inputs[1]], (PICKS, M), axis=0)
    return b.op("Add", [y, picked])


def clamped(b: Builder, y: ir.Value, alpha: float = 1.702) -> ir.Value:
    """What gpt-oss does with gates and ups in turns."""
    halves = []
    for first in (0, 1):
        ends = [b.ints([n], "end") for n in (first, M, 1, 2)]
        halves.append(b.op("Slice", [y, *ends], (PICKS, M // 2)))
    limit = b.scalar(1.5, FLOAT)
    minus, one = b.scalar(-1.5, FLOAT), b.scalar(1.0, FLOAT)
    gate = ir.node("Clip", [halves[0], None, limit])
    b.nodes.append(gate)
    gate.outputs[0].shape, gate.outputs[0].dtype = halves[0].shape, FLOAT
    up = b.op("Add", [b.op("Clip", [halves[1], minus, limit], (PICKS, M // 2)), one])
    inner = b.op("Sigmoid", [b.op("Mul", [gate.outputs[0], b.scalar(alpha, FLOAT)])])
    return b.op("Mul", [up, b.op("Mul", [gate.outputs[0], inner])])


def test_biases_and_gates_in_turns() -> None:
    model, b, y = graph()
    model = finished(model, b, clamped(b, biased(model, b, y)))
    check_same_results(model, FuseCpuExperts(), inputs(), rtol=1e-5)
    assert kinds(model) == ["FloatExpertLinear"]
    linear = linear_of(model)
    assert (linear.activation, linear.is_gated, linear.out_features) == ("clamped_swiglu", True, M // 2)
    assert linear.activation_limit == pytest.approx(1.5)


@pytest.mark.parametrize("op_type", ["Sigmoid", "Gelu"])
def test_gates_in_halves(op_type: str) -> None:
    model, b, y = graph()
    gate, up = b.split(y, (M // 2, M // 2), 1)
    active = b.op("Mul", [gate, b.op("Sigmoid", [gate])]) if op_type == "Sigmoid" else b.op("Gelu", [gate])
    model = finished(model, b, b.op("Mul", [active, up]))
    check_same_results(model, FuseCpuExperts(), inputs(), rtol=1e-5)
    assert kinds(model) == ["FloatExpertLinear"]
    assert linear_of(model).activation == ("silu" if op_type == "Sigmoid" else "gelu")


def summed(model: ir.Model, b: Builder, y: ir.Value, axis: int = 1) -> ir.Value:
    weights = value("weights", (TOKENS, TOP_K), FLOAT)
    model.graph.inputs.append(weights)
    scaled = b.op("Mul", [y, b.reshape(weights, (PICKS, 1))])
    by_token = b.reshape(scaled, (TOKENS, TOP_K, M))
    shape = (TOKENS, M) if axis == 1 else (TOP_K, M)
    return b.op("ReduceSum", [by_token, b.ints([axis], "axes")], shape, keepdims=0)


def test_weighted_sums_and_what_is_added_to_them() -> None:
    model, b, y = graph()
    residual = value("residual", (1, TOKENS, M), FLOAT)
    model.graph.inputs.append(residual)
    total = b.op("Mul", [b.reshape(summed(model, b, y), (1, TOKENS, M)), b.scalar(0.22, FLOAT)])
    model = finished(model, b, b.op("Add", [residual, total]))
    given = inputs(weights=numbers(TOKENS, TOP_K, seed=3), residual=numbers(1, TOKENS, M, seed=4))
    check_same_results(model, FuseCpuExperts(), given, rtol=1e-5)
    check_same_results(model, FuseCpuAdditions(), given, rtol=1e-5)
    assert kinds(model) == ["FloatExpertLinear"]
    assert linear_of(model).shape == (1, TOKENS, M)
    assert linear_of(model).multiplier == pytest.approx(0.22)


def other_function() -> ir.Model:
    model, b, y = graph()
    return finished(model, b, clamped(b, y, alpha=1.5))


def other_sum() -> ir.Model:
    model, b, y = graph()
    return finished(model, b, summed(model, b, y, axis=0))


def other_picks() -> ir.Model:
    model, b, y = graph()
    others = value("others", (PICKS,), ir.DataType.INT64)
    model.graph.inputs.append(others)
    table = constant(model.graph, numbers(E, M, seed=2), "table")
    return finished(model, b, b.op("Add", [y, b.op("Gather", [table, others], (PICKS, M), axis=0)]))


@pytest.mark.parametrize("make", [other_function, other_sum, other_picks])
def test_left_alone(make: Callable[[], ir.Model]) -> None:
    check_left_alone(make(), FuseCpuExperts())
