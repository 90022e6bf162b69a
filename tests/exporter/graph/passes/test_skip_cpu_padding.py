"""skip_cpu_padding: matmuls of the CPU library leave out rows of a chunk without a token."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from sinkexport.graph.cpu_nodes import Linear, find_linears
from sinkexport.graph.passes.fold_weight_transposes import FoldWeightTransposes
from sinkexport.graph.passes.skip_cpu_padding import SkipCpuPadding
from sinkexport.graph.passes.use_cpu_linears import UseCpuLinears

from tests.exporter.graph.passes.cpu_graphs import linear_graph
from tests.exporter.graph.passes.pass_checks import check_left_alone, evaluated, numbers, parsed, written

T, DEPTH = 5, 12


def chunk(body: str, *, shape: str = f"1, {T}, {DEPTH}", result: str = f"1, {T}, {DEPTH}") -> ir.Model:
    """A prefill graph's end: ids, x, then `body`, with matrices U = u, W = w [DEPTH, DEPTH] turned."""
    model = parsed(
        f"U = Transpose <perm = [1, 0]> (u) W = Transpose <perm = [1, 0]> (w) {body}",
        f"int64[1, {T}] ids, float[{shape}] x, int64[1] num_valid",
        f"float[{result}] y",
        f"{written('u', numbers(DEPTH, DEPTH))}, {written('w', numbers(DEPTH, DEPTH, seed=1))}",
    )
    FoldWeightTransposes()(model)
    assert UseCpuLinears()(model).modified
    return model


def fields(model: ir.Model) -> list[tuple[int, int]]:
    """num_tokens and repeats_last of every matmul."""
    nodes = [node for node, _ in find_linears(model.graph)]
    return [tuple(node.attributes[name].as_int() for name in ("num_tokens", "repeats_last")) for node in nodes]


@pytest.mark.parametrize("valid", [1, 3, T])
def test_rows_of_tokens_are_what_they_were(valid: int) -> None:
    model, inputs = chunk("s = MatMul (x, U) y = MatMul (s, W)"), {"ids": np.zeros((1, T), np.int64)}
    inputs |= {"x": numbers(1, T, DEPTH, seed=2), "num_valid": np.array([valid])}
    (want,) = evaluated(model, inputs)
    assert SkipCpuPadding()(model).modified
    (got,) = evaluated(model, inputs)
    assert np.array_equal(got[:, :valid], want[:, :valid])
    assert np.array_equal(got[:, valid:], np.repeat(want[:, valid - 1 : valid], T - valid, axis=1))
    assert fields(model) == [(T, 0), (T, 1)]  # the first one's rows are read by the second alone
    check_left_alone(model, SkipCpuPadding())


def test_a_linear_that_is_read_back_has_its_inputs() -> None:
    model = chunk("y = MatMul (x, U)")
    ((_, before),) = find_linears(model.graph)
    SkipCpuPadding()(model)
    ((node, after),) = find_linears(model.graph)
    assert node.inputs[-1] is model.graph.inputs[-1]
    assert (after.weights, after.residual) == (before.weights, before.residual)
    assert Linear.of(node).x is before.x


def test_rows_that_others_read_are_filled() -> None:
    model = chunk("s = MatMul (x, U) e = Exp (s) m = MatMul (e, W) y = Add (m, s)")
    SkipCpuPadding()(model)
    assert fields(model) == [(T, 1), (T, 1)]


def test_heads_of_each_token() -> None:
    model = chunk("y = MatMul (x, U)", shape=f"1, {T}, 2, {DEPTH}", result=f"1, {T}, 2, {DEPTH}")
    assert SkipCpuPadding()(model).modified


def test_left_alone() -> None:
    last = chunk("y = MatMul (x, U)", shape=f"1, 1, {DEPTH}", result=f"1, 1, {DEPTH}")  # of the last token
    check_left_alone(last, SkipCpuPadding())
    heads = chunk("y = MatMul (x, U)", shape=f"1, 2, {T}, {DEPTH}", result=f"1, 2, {T}, {DEPTH}")
    check_left_alone(heads, SkipCpuPadding())
    check_left_alone(linear_graph("y = Add (s, r)"), SkipCpuPadding())  # a decode graph has no num_valid
