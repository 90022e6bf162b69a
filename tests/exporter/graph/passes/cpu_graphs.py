"""Graphs of matmuls in the CPU library's form, for tests of the passes that fuse what is around them."""

from __future__ import annotations

import onnx_ir as ir
from sinkexport.graph.passes.fold_weight_transposes import FoldWeightTransposes
from sinkexport.graph.passes.use_cpu_linears import UseCpuLinears

from tests.exporter.graph.passes.pass_checks import numbers, parsed, written

DEPTH, WIDTH = 12, 20


def linear_graph(body: str, outputs: str = "", *, converted: bool = True, width: int = WIDTH, **sizes: int) -> ir.Model:
    """``s = MatMul (x, W)``, then `body`; W is w [width, DEPTH] turned. x, r: float32 [2, 3, DEPTH], [2, 3, width].

    Constants: b [width], g, h [DEPTH]. sizes: of an input z [2, 3, ..]. converted: whether the matmul is a node of the
    library.
    """
    constants = [
        written("w", numbers(width, DEPTH)),
        written("b", numbers(width, seed=1)),
        written("g", numbers(DEPTH, seed=2)),
        written("h", numbers(DEPTH, seed=3)),
        "float two = {2}",
    ]
    inputs = f"float[2, 3, {DEPTH}] x, float[2, 3, {width}] r, int64[2] ids"
    if sizes:
        inputs += f", float[2, 3, {sizes['z']}] z"
    text = body if "MatMul" in body or "Gather" in body else f"s = MatMul (x, W) {body}"
    model = parsed(
        f"W = Transpose <perm = [1, 0]> (w) {text}", inputs, outputs or f"float[2, 3, {width}] y", ", ".join(constants)
    )
    FoldWeightTransposes()(model)
    if converted:
        assert UseCpuLinears()(model).modified
    return model


def linear_of(model: ir.Model) -> ir.Node:
    """The only linear."""
    (node,) = (node for node in model.graph if node.op_type == "FloatLinear")
    return node
