"""Operators of opset 24 as those of opset 17, the last that TensorRT 8.5's parser knows, and only those that it takes.

What it lacks is written out: LayerNormalization is of opset 17 but not of that parser, Gelu and Mish are younger.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape, operand, optional, replace_node, static_shape
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.operators import DOMAIN
from sinkexport.graph.plugin_nodes import no_plugin_form

OPSET = 17

SAME = frozenset(
    (
        "Abs",
        "Add",
        "And",
        "ArgMax",
        "Cast",
        "Ceil",
        "Celu",
        "Clip",
        "Concat",
        "ConstantOfShape",
        "Conv",
        "Cos",
        "DequantizeLinear",
        "Div",
        "Elu",
        "Equal",
        "Erf",
        "Exp",
        "Expand",
        "Floor",
        "Gather",
        "GatherElements",
        "GatherND",
        "Gemm",
        "Greater",
        "GreaterOrEqual",
        "HardSigmoid",
        "LeakyRelu",
        "Less",
        "LessOrEqual",
        "Log",
        "LogSoftmax",
        "MatMul",
        "Max",
        "Min",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "PRelu",
        "Pow",
        "QuantizeLinear",
        "Reciprocal",
        "ReduceSum",
        "Relu",
        "Reshape",
        "Round",
        "ScatterElements",
        "ScatterND",
        "Selu",
        "Shape",
        "Sigmoid",
        "Sign",
        "Sin",
        "Slice",
        "Softmax",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Sub",
        "Tanh",
        "Tile",
        "TopK",
        "Transpose",
        "Unsqueeze",
        "Where",
    )
)
"""Operators that mean the same in both, as far as a bundle's graph uses them."""

_AXES_WERE_ATTRIBUTES = frozenset(("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"))


class LowerToOpset17(GraphPass):
    """Write operators of opset 24 as those of opset 17. Nodes of this project's domain stay as they are."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace what differs, and declare the opset.

        Raises: NoPluginFormError naming an operator that has no such form.
        """
        if model.opset_imports[""] <= OPSET:
            return ir.passes.PassResult(model, False)
        graph = model.graph
        others = [node for node in graph if node.domain != DOMAIN and node.op_type not in SAME]
        values = (value for node in others for value in (*node.inputs, *node.outputs) if value is not None)
        if any(static_shape(value) is None for value in values):
            ShapeInferencePass()(model)  # functions of torch's in several nodes have no shapes between them
        for node in others:
            if node.op_type in _AXES_WERE_ATTRIBUTES:
                _axes_as_attribute(graph, node)
            elif node.op_type == "Split":
                _sizes_as_input(graph, node)
            elif node.op_type == "Pad":
                _pads_of_all_axes(graph, node)
            elif node.op_type == "LayerNormalization":
                _expand_layer_norm(graph, node)
            elif node.op_type == "RMSNormalization":
                _expand_rms_norm(graph, node)
            elif node.op_type == "Gelu":
                _expand_gelu(graph, node)
            elif node.op_type == "HardSwish":
                _expand_hard_swish(graph, node)
            elif node.op_type == "Mish":
                _expand_mish(graph, node)
            else:
                raise no_plugin_form(f"{node.op_type} '{node.name}', which has no form in opset {OPSET} here")
        model.opset_imports[""] = OPSET
        return ir.passes.PassResult(model, True)


def _axes_as_attribute(graph: ir.Graph, node: ir.Node) -> None:
    axes = optional(node, 1)
    keeps = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
    attributes: dict[str, Any] = {"keepdims": keeps}
    if axes is not None:
        if axes.const_value is None:
            raise no_plugin_form(f"{node.op_type} '{node.name}' over axes that are found at run time")
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


def _pads_of_all_axes(graph: ir.Graph, node: ir.Node) -> None:
    """Pad(pads, axes) -> Pad(pads of every axis)."""
    x, pads, value, axes = operand(node, 0), operand(node, 1), optional(node, 2), optional(node, 3)
    if axes is None:
        return
    if pads.const_value is None or axes.const_value is None:
        raise no_plugin_form(f"Pad '{node.name}' by sizes that are found at run time")
    rank = len(known_shape(x))
    sizes = np.zeros((2, rank), np.int64)
    sizes[:, axes.const_value.numpy()] = pads.const_value.numpy().reshape(2, -1)
    b, result = Builder(graph), node.outputs[0]
    inputs = [x, b.ints(sizes.ravel().tolist(), "pads"), *([] if value is None else [value])]
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
    replace_node(node, b.nodes, [b.op("Pad", inputs, known_shape(result), result.dtype, mode=mode)])


def _expand_layer_norm(graph: ir.Graph, node: ir.Node) -> None:
    """Layer norm over the last axis, in float32 as the operator itself computes (arXiv:1607.06450)."""
    x, scale, bias = operand(node, 0), operand(node, 1), optional(node, 2)
    rank = len(known_shape(x))
    if node.attributes["axis"].as_int() not in (-1, rank - 1):
        raise no_plugin_form(f"LayerNormalization '{node.name}' over more than the last axis")
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


def _expand_rms_norm(graph: ir.Graph, node: ir.Node) -> None:
    """Root-mean-square norm over the last axis, in float32 as the operator itself computes (arXiv:1910.07467)."""
    x, scale = operand(node, 0), operand(node, 1)
    shape = known_shape(x)
    if node.attributes["axis"].as_int() not in (-1, len(shape) - 1):
        raise no_plugin_form(f"RMSNormalization '{node.name}' over more than the last axis")
    b, dtype = Builder(graph), x.dtype or ir.DataType.FLOAT
    wide = b.cast(x, ir.DataType.FLOAT)
    square = b.op("Mul", [wide, wide])
    mean = b.op("ReduceMean", [square], (*shape[:-1], 1), ir.DataType.FLOAT, axes=[-1], keepdims=1)
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    root = b.op("Sqrt", [b.op("Add", [mean, b.scalar(epsilon, ir.DataType.FLOAT)])])
    out = b.cast(b.op("Div", [wide, root]), dtype)
    replace_node(node, b.nodes, [b.op("Mul", [out, scale])])


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


def _expand_hard_swish(graph: ir.Graph, node: ir.Node) -> None:
    """x * HardSigmoid(x), which is max(0, min(1, x / 6 + 1 / 2)) (arXiv:1905.02244)."""
    b, x = Builder(graph), operand(node, 0)
    gate = b.op("HardSigmoid", [x], known_shape(x), x.dtype, alpha=1 / 6, beta=0.5)
    replace_node(node, b.nodes, [b.op("Mul", [x, gate])])


def _expand_mish(graph: ir.Graph, node: ir.Node) -> None:
    """x * tanh(softplus(x)) (arXiv:1908.08681)."""
    b, x = Builder(graph), operand(node, 0)
    replace_node(node, b.nodes, [b.op("Mul", [x, b.op("Tanh", [b.op("Softplus", [x])])])])
