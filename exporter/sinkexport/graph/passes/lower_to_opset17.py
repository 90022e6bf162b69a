"""Operators of opset 24 as those of opset 17, the last that TensorRT 8.5's parser knows, and only those that it takes.

What it lacks is written out: LayerNormalization is of opset 17 but not of that parser, Gelu is of opset 20.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape, operand, optional, replace_node
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.operators import DOMAIN

OPSET = 17

SAME = frozenset(
    (
        "Add",
        "Cast",
        "Clip",
        "Concat",
        "Conv",
        "DequantizeLinear",
        "Div",
        "Equal",
        "Erf",
        "Exp",
        "Expand",
        "Gather",
        "Gemm",
        "Greater",
        "Less",
        "MatMul",
        "Max",
        "Min",
        "Mul",
        "Neg",
        "Pow",
        "QuantizeLinear",
        "Reciprocal",
        "ReduceSum",
        "Relu",
        "Reshape",
        "ScatterElements",
        "Sigmoid",
        "Slice",
        "Softmax",
        "Softplus",
        "Sqrt",
        "Sub",
        "Tanh",
        "TopK",
        "Transpose",
        "Where",
    )
)
"""Operators that mean the same in both, as far as a bundle's graph uses them."""

_AXES_WERE_ATTRIBUTES = frozenset(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"))


class LowerToOpset17(GraphPass):
    """Write operators of opset 24 as those of opset 17. Nodes of this project's domain stay as they are."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace what differs, and declare the opset.

        Raises: ValueError naming an operator that has no such form.
        """
        if model.opset_imports[""] <= OPSET:
            return ir.passes.PassResult(model, False)
        graph = model.graph
        for node in list(graph):
            if node.domain == DOMAIN or node.op_type in SAME:
                continue
            if node.op_type in _AXES_WERE_ATTRIBUTES:
                _axes_as_attribute(graph, node)
            elif node.op_type == "Split":
                _sizes_as_input(graph, node)
            elif node.op_type == "LayerNormalization":
                _expand_layer_norm(graph, node)
            elif node.op_type == "Gelu":
                _expand_gelu(graph, node)
            else:
                raise ValueError(f"{node.op_type} '{node.name}' has no form in opset {OPSET} here")
        model.opset_imports[""] = OPSET
        return ir.passes.PassResult(model, True)


def _axes_as_attribute(graph: ir.Graph, node: ir.Node) -> None:
    axes = optional(node, 1)
    keeps = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
    attributes: dict[str, Any] = {"keepdims": keeps}
    if axes is not None:
        if axes.const_value is None:
            raise ValueError(f"{node.op_type} '{node.name}' over axes that are found at run time")
        attributes["axes"] = [int(axis) for axis in axes.const_value.numpy()]
    b, result = Builder(graph), node.outputs[0]
    out = b.op(node.op_type, [operand(node, 0)], known_shape(result), result.dtype, **attributes)
    replace_node(node, b.nodes, [out])


def _sizes_as_input(graph: ir.Graph, node: ir.Node) -> None:
    """Split(num_outputs=n) -> Split(sizes)."""
    if "num_outputs" not in node.attributes:
        return
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    b = Builder(graph)
    sizes = [known_shape(output)[axis] for output in node.outputs]
    replace_node(node, b.nodes, b.split(operand(node, 0), sizes, axis))


def _expand_layer_norm(graph: ir.Graph, node: ir.Node) -> None:
    """Layer norm over the last axis, in float32 as the operator itself computes (arXiv:1607.06450)."""
    x, scale, bias = operand(node, 0), operand(node, 1), optional(node, 2)
    rank = len(known_shape(x))
    if node.attributes["axis"].as_int() not in (-1, rank - 1):
        raise ValueError(f"LayerNormalization '{node.name}' over more than the last axis")
    b, dtype = Builder(graph), x.dtype or ir.DataType.FLOAT
    width, wide = (*known_shape(x)[:-1], 1), b.cast(x, ir.DataType.FLOAT)

    def mean(value: ir.Value) -> ir.Value:
        return b.op("ReduceMean", [value], width, ir.DataType.FLOAT, axes=[-1], keepdims=1)

    centred = b.op("Sub", [wide, mean(wide)])
    epsilon = b.scalar(node.attributes["epsilon"].as_float(), ir.DataType.FLOAT)
    variance = b.op("Add", [mean(b.op("Mul", [centred, centred])), epsilon])
    out = b.cast(b.op("Div", [centred, b.op("Sqrt", [variance])]), dtype)
    out = b.op("Mul", [out, scale])
    if bias is not None:
        out = b.op("Add", [out, bias])
    replace_node(node, b.nodes, [out])


def _expand_gelu(graph: ir.Graph, node: ir.Node) -> None:
    """x * Phi(x), exactly or by tanh (arXiv:1606.08415)."""
    b, x = Builder(graph), operand(node, 0)
    approximate = node.attributes["approximate"].as_string() if "approximate" in node.attributes else "none"
    if approximate == "tanh":
        cube = b.op("Mul", [b.op("Mul", [x, x]), x])
        inner = b.op("Add", [x, b.op("Mul", [cube, b.scalar(0.044715, x.dtype)])])
        phi = b.op("Tanh", [b.op("Mul", [inner, b.scalar(math.sqrt(2 / math.pi), x.dtype)])])
    else:
        phi = b.op("Erf", [b.op("Mul", [x, b.scalar(math.sqrt(0.5), x.dtype)])])
    phi = b.op("Mul", [b.op("Add", [phi, b.scalar(1.0, x.dtype)]), b.scalar(0.5, x.dtype)])
    replace_node(node, b.nodes, [b.op("Mul", [x, phi])])
