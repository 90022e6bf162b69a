"""Weights in the orientation that MatMul reads, and projections of one input joined into one MatMul.

A decode step reads every weight once, so its speed is that of memory; fewer, larger products reach more of the
bandwidth and leave fewer nodes. Everything is computed lazily, while the weights file is written.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import is_weight, known_shape, lazy_weight, only_user, replace_node

ROWS = "rows"
"""Key in the metadata of a weight [K, N] that was made here: the tensors [n, K] of which it is the transpose, in order,
as pairs (name, tensor)."""


def fold_weight_transposes(model: ir.Model) -> None:
    """x @ Transpose(W): W is stored transposed, or read by Gemm(transB=1) if something else needs it as it is.

    The second case is an embedding that is tied to the output projection: it stays one tensor in the file.
    """
    graph = model.graph
    for node in list(graph):
        if node.domain or node.op_type != "Transpose" or not is_weight(node.inputs[0]):
            continue
        weight = node.inputs[0]
        if weight is None or len(known_shape(weight)) != 2:
            continue
        users = [use.node for use in node.outputs[0].uses()]
        if any(user.domain or user.op_type != "MatMul" or user.inputs[1] is not node.outputs[0] for user in users):
            continue
        if len(weight.uses()) > 1:
            for user in users:
                _use_gemm(graph, user, weight)
        else:
            rows, columns = known_shape(weight)
            source = weight.const_value
            transposed = lazy_weight(
                graph,
                f"{weight.name}.T",
                weight.dtype,  # type: ignore[arg-type]
                (columns, rows),
                functools.partial(_transposed, source),
            )
            transposed.meta[ROWS] = ((str(weight.name), source),)
            ir.convenience.replace_all_uses_with(node.outputs[0], transposed)
        graph.remove(node, safe=True)


def _transposed(tensor: ir.TensorProtocol | None) -> np.ndarray:
    if tensor is None:
        raise ValueError("a weight without content")
    return np.ascontiguousarray(tensor.numpy().T)


def _use_gemm(graph: ir.Graph, matmul: ir.Node, weight: ir.Value) -> None:
    """MatMul(x, W^T) with x [..., K] -> Gemm over x [rows, K] with transB."""
    x, result = matmul.inputs[0], matmul.outputs[0]
    if x is None:
        raise ValueError(f"MatMul '{matmul.name}' without an input")
    *_, depth = known_shape(x)
    rows, width = int(np.prod(known_shape(x))) // depth, known_shape(weight)[0]
    b = Builder(graph)
    product = b.op("Gemm", [b.reshape(x, (rows, depth)), weight], (rows, width), transB=1)
    replace_node(matmul, b.nodes, [b.reshape(product, known_shape(result))])


def merge_projections(model: ir.Model, kind: Callable[[str], object] | None = None) -> None:
    """MatMuls of one input with weights of their own become one MatMul and a Split (q, k, v; gate, up).

    Biases are joined as well if every one of them has one.
    kind: of a weight, by its name; only weights of one kind are joined. None: all are of one kind.
    """
    graph = model.graph
    by_input: dict[tuple[ir.Value, object], list[ir.Node]] = defaultdict(list)
    for node in graph:
        if not node.domain and node.op_type == "MatMul" and node.inputs[0] is not None and is_weight(node.inputs[1]):
            weight = node.inputs[1]
            if weight is not None and len(known_shape(weight)) == 2 and len(weight.uses()) == 1:
                by_input[node.inputs[0], kind and kind(str(weight.name))].append(node)
    for (x, _), matmuls in by_input.items():
        if len(matmuls) > 1:
            _merge(graph, x, matmuls)


def _merge(graph: ir.Graph, x: ir.Value, matmuls: list[ir.Node]) -> None:
    weights = [weight for node in matmuls if (weight := node.inputs[1]) is not None]
    widths = [known_shape(w)[1] for w in weights]
    results = [node.outputs[0] for node in matmuls]
    additions = [bias_addition(result) for result in results]
    b = Builder(graph)
    value = b.matmul(x, _joined(graph, weights))
    replaced = list(matmuls)
    if all(addition is not None for addition in additions):
        biases = [bias for addition in additions if (bias := weight_operand(addition)) is not None]
        value = b.op("Add", [value, _joined(graph, biases)])
        results = [addition.outputs[0] for addition in additions if addition is not None]
        replaced += [addition for addition in additions if addition is not None]
    parts = b.split(value, widths, -1)
    graph.insert_before(matmuls[0], b.nodes)
    for part, result in zip(parts, results, strict=True):
        ir.convenience.replace_all_uses_with(result, part, replace_graph_outputs=True)
    graph.remove(list(reversed(replaced)), safe=True)


def bias_addition(product: ir.Value) -> ir.Node | None:
    """The Add of a 1-D weight that is the only reader of `product`."""
    addition = only_user(product, "Add")
    other = weight_operand(addition)
    return addition if other is not None and known_shape(other) == known_shape(product)[-1:] else None


def weight_operand(node: ir.Node | None) -> ir.Value | None:
    """The first input that is a constant; None: none is, or there is no node."""
    return next((value for value in node.inputs if is_weight(value)), None) if node is not None else None


def _joined(graph: ir.Graph, weights: list[ir.Value]) -> ir.Value:
    """Weights side by side along the last axis."""
    sources = [weight.const_value for weight in weights]
    name = "+".join(str(weight.name) for weight in weights)
    *rest, _ = known_shape(weights[0])
    width = sum(known_shape(weight)[-1] for weight in weights)
    joined = lazy_weight(
        graph,
        name,
        weights[0].dtype,  # type: ignore[arg-type]
        (*rest, width),
        lambda: np.concatenate([source.numpy() for source in sources], axis=-1),  # type: ignore[union-attr]
    )
    if all(ROWS in weight.meta for weight in weights):
        joined.meta[ROWS] = tuple(row for weight in weights for row in weight.meta[ROWS])
    return joined
