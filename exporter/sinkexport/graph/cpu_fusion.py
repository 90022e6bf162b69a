"""What passes share that let the CPU library's matmuls take over other nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.cpu_nodes import CpuMatmul, ExpertLinear, Linear
from sinkexport.graph.edit import drop_unused, known_shape, lazy_weight, replace_node
from sinkexport.graph.packed_weights import BY_HEAD, PackedMatrix


def repacked(graph: ir.Graph, matmul: CpuMatmul, matrix: PackedMatrix) -> tuple[ir.Value, ...]:
    """Constants of a matrix in the place of a matmul's weights, which nothing else may read."""
    for value in matmul.weights:
        graph.initializers.pop(str(value.name))
    return tuple(matrix.values(graph))


def reordered_bias(graph: ir.Graph, bias: ir.Value, order: np.ndarray) -> ir.Value:
    """A bias [.., N] in the order of a matrix's rows. order: int64 [N]."""
    source = bias.const_value
    if source is None:
        raise ValueError(f"'{bias.name}' has no content")
    name = f"{bias.name}{BY_HEAD}"
    return lazy_weight(graph, name, ir.DataType.FLOAT, known_shape(bias), lambda: source.numpy()[..., order])


_Kind = TypeVar("_Kind", Linear, ExpertLinear)


def absorb(
    graph: ir.Graph,
    matmuls: Iterable[tuple[ir.Node, _Kind]],
    found_after: Callable[[ir.Node, _Kind], tuple[ir.Node, _Kind] | None],
) -> bool:
    """Let matmuls take over what follows them. Returns whether any did.

    found_after: the last node that is taken over, and the matmul that does so; None: nothing is.
    """
    modified = False
    for node, matmul in matmuls:
        if (found := found_after(node, matmul)) is None:
            continue
        last, fused = found
        b = Builder(graph)
        replace_node(last, b.nodes, [b.reshape(fused.write(b), known_shape(last.outputs[0]))])
        drop_unused(graph)
        modified = True
    return modified
