"""Move large channels of matmuls' inputs into their weights (SmoothQuant, arXiv:2211.10438), changing no result.

``x @ W = (x / d) @ (d * W)``. The division is free where the node that makes x has weights that can take it over: a
norm; the values' projection, since attention mixes tokens and never channels; the matmul that a gate multiplies.
Elsewhere it is a Mul of x. Weights stay lazy: nothing is computed before it is written.
"""

from __future__ import annotations

import functools
from collections import defaultdict

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import constant, is_weight, known_shape, lazy_weight
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.matmuls import ROWS, find_matmuls
from sinkexport.graph.operators import Input

Floats = npt.NDArray[np.float64]
NORMS = ("RMSNormalization", "LayerNormalization")


_SMOOTHED = "smoothed"
"""Key in the metadata of a weight that was multiplied already."""


class SmoothInputs(GraphPass):
    """Divide the inputs of matmuls by the plan's divisors [K], and multiply their weights by them.

    Matmuls of one input have the same divisors, or none. Projections must not be joined yet.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Smooth every matmul for whose module the plan has divisors; without a plan change nothing."""
        plan, graph = self.context.plan, model.graph
        if plan is None:
            return ir.passes.PassResult(model, False)
        # A reader that nothing reads would stand in the way.
        modified = common.RemoveUnusedNodesPass()(model).modified
        by_input: dict[ir.Value, list[ir.Node]] = defaultdict(list)
        found: dict[ir.Value, Floats] = {}
        for matmul in find_matmuls(graph):
            divisors = None if _SMOOTHED in matmul.weight.meta else plan.divisors(matmul.modules[0])
            if divisors is not None:
                by_input[matmul.x].append(matmul.node)
                found[matmul.x] = divisors
        for x, nodes in by_input.items():
            if len(list(x.uses())) != len(nodes) or x.is_graph_output() or not _take_over(graph, x, 1.0 / found[x]):
                _multiply(graph, x, nodes, 1.0 / found[x])
            for node in nodes:
                _scale_matrix(graph, node, found[x][:, None])
                node.inputs[1].meta[_SMOOTHED] = True  # type: ignore[union-attr]
        return ir.passes.PassResult(model, modified or bool(by_input))


def _take_over(graph: ir.Graph, x: ir.Value, factors: Floats) -> bool:
    """Make x come out multiplied by factors [K]; False if the node that makes it has no weights for that."""
    node = x.producer()
    if node is None:
        return False
    if node.op_type in NORMS:
        return _scale_norm(graph, node, factors)
    if node.op_type == "Mul":
        for i, value in enumerate(node.inputs):
            if is_weight(value) and value is not None and known_shape(value) == factors.shape:
                node.replace_input_with(i, _scaled(graph, value, factors))  # a norm in parts
                return True
        return any(_scale_matmul(graph, value, factors) for value in node.inputs if value is not None)
    attention = _behind(x).producer()
    if attention is not None and attention.op_type == "SinkAttention" and _is_only_read_in_shape(x, attention):
        return _scale_values(graph, attention, factors)
    return False


def _scale_norm(graph: ir.Graph, node: ir.Node, factors: Floats) -> bool:
    parameters = [i for i, value in enumerate(node.inputs) if i > 0 and value is not None]
    scale = node.inputs[1]
    if scale is None or known_shape(scale) != factors.shape:
        return False
    if any(not is_weight(node.inputs[i]) for i in parameters):
        made_of = scale.producer()  # some families store scale - 1
        if len(parameters) > 1 or made_of is None or not all(is_weight(value) for value in made_of.inputs):
            return False
        b = Builder(graph)
        node.replace_input_with(1, b.op("Mul", [scale, _vector(graph, factors, scale.dtype)]))
        graph.insert_before(node, b.nodes)
        return True
    for i in parameters:
        node.replace_input_with(i, _scaled(graph, node.inputs[i], factors))
    return True


def _scale_values(graph: ir.Graph, attention: ir.Node, factors: Floats) -> bool:
    """factors [Hq * D]; query heads that share a value head must agree."""
    values = attention.inputs[Input.V]
    if values is None:
        return False
    _, num_heads, _, head_dim = known_shape(values)
    groups = factors.reshape(num_heads, -1, head_dim)  # [Hkv, Hq / Hkv, D]
    if not (groups == groups[:, :1]).all():
        return False
    return _scale_matmul(graph, _behind(values, only_reader=True), groups[:, 0].reshape(-1))


def _scale_matmul(graph: ir.Graph, value: ir.Value, factors: Floats) -> bool:
    """Make a matmul by a constant matrix, with or without a bias, come out multiplied by factors [N]."""
    node = value.producer()
    if node is None or len(list(value.uses())) != 1 or value.is_graph_output():
        return False
    bias = None
    if node.op_type == "Add":
        bias = next((i for i, operand in enumerate(node.inputs) if is_weight(operand)), None)
        unbiased = node.inputs[1 - bias] if bias is not None else None
        if bias is None or unbiased is None or len(list(unbiased.uses())) != 1:
            return False
        if known_shape(node.inputs[bias]) != factors.shape:  # type: ignore[arg-type]
            return False
        addition, node = node, unbiased.producer()
    if node is None or node.op_type != "MatMul" or node.domain or not is_weight(node.inputs[1]):
        return False
    weight = node.inputs[1]
    if weight is None or ROWS not in weight.meta or len(list(weight.uses())) != 1:
        return False
    if known_shape(weight)[1:] != factors.shape:
        return False
    _scale_matrix(graph, node, factors[None, :])
    if bias is not None:
        addition.replace_input_with(bias, _scaled(graph, addition.inputs[bias], factors))
    return True


def _scale_matrix(graph: ir.Graph, node: ir.Node, factors: Floats) -> None:
    """Multiply the matrix [K, N] of a matmul, and the rows that it is made of, by factors [K, 1] or [1, N].

    A Gemm has it as [N, K], which is made of nothing else.
    """
    weight = node.inputs[1]
    if weight is None:
        raise ValueError(f"'{node.name}' without a matrix")
    rows = weight.meta.get(ROWS, ())
    if len(rows) > 1:
        raise ValueError(f"'{weight.name}' is joined already")
    scaled = _scaled(graph, weight, factors if rows else factors.T)
    if _SMOOTHED in weight.meta:
        scaled.meta[_SMOOTHED] = True
    for name, tensor in rows:
        scaled.meta[ROWS] = ((name, _lazy(tensor, factors.T)),)
    node.replace_input_with(1, scaled)


def _scaled(graph: ir.Graph, weight: ir.Value | None, factors: Floats) -> ir.Value:
    """A weight times factors of a shape that fits, under its own name if nothing else will read it."""
    if weight is None or weight.const_value is None or weight.dtype is None or weight.name is None:
        raise ValueError("no weight")
    tensor, name = weight.const_value, weight.name
    if len(list(weight.uses())) > 1:
        name += ".smoothed"
    else:
        graph.initializers.pop(name)
    return lazy_weight(graph, name, weight.dtype, known_shape(weight), functools.partial(_times, tensor, factors))


def _lazy(tensor: ir.TensorProtocol, factors: Floats) -> ir.LazyTensor:
    return ir.LazyTensor(
        lambda: ir.Tensor(_times(tensor, factors), name=tensor.name),
        dtype=tensor.dtype,
        shape=tensor.shape,  # type: ignore[arg-type]
        name=tensor.name,
    )


def _times(tensor: ir.TensorProtocol, factors: Floats) -> np.ndarray:
    values = tensor.numpy()
    return np.asarray(values * factors.astype(np.float32), values.dtype)


def _multiply(graph: ir.Graph, x: ir.Value, nodes: list[ir.Node], factors: Floats) -> None:
    """Let the nodes read x times factors [K]."""
    b = Builder(graph)
    scaled = b.op("Mul", [x, _vector(graph, factors, x.dtype)])
    graph.insert_before(nodes[0], b.nodes)
    for node in nodes:
        node.replace_input_with(0, scaled)


def _vector(graph: ir.Graph, factors: Floats, dtype: ir.DataType | None) -> ir.Value:
    return constant(graph, factors.astype((dtype or ir.DataType.FLOAT).numpy()), "smoothing")


def _behind(value: ir.Value, *, only_reader: bool = False) -> ir.Value:
    """What `value` is a view or a transposition of. only_reader: stop where something else reads it."""
    node = value.producer()
    while node is not None and node.op_type in ("Reshape", "Transpose") and not node.domain:
        before = node.inputs[0]
        if before is None or (only_reader and len(list(value.uses())) != 1):
            break
        value, node = before, before.producer()
    return value


def _is_only_read_in_shape(x: ir.Value, attention: ir.Node) -> bool:
    """Whether all that reads the attention's result is the chain that leads to x, whose last axis is [Hq * D]."""
    value = attention.outputs[0]
    while value is not x:
        uses = list(value.uses())
        if len(uses) != 1:
            return False
        value = uses[0].node.outputs[0]
    heads = known_shape(attention.outputs[0])
    return known_shape(x)[-1] == heads[1] * heads[3]
