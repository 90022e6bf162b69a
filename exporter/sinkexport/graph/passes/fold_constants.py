"""Fold what does not depend on the inputs, and give every value a shape."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants

from sinkexport.graph.builder import COMPARISONS
from sinkexport.graph.edit import static_shape, typed

SMALL_ELEMENTS = 4096
"""Largest constant that is folded: shapes and indices, never weights."""


def fold_small_constants(model: ir.Model) -> None:
    """Evaluate shape arithmetic now, and turn sequences that torch's converter makes of chunks into Split."""
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    fold_constants(model, input_size_limit=SMALL_ELEMENTS, output_size_limit=SMALL_ELEMENTS)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)


_ELEMENTWISE = frozenset(
    (
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "Sqrt",
        "Reciprocal",
        "Sigmoid",
        "Tanh",
        "Neg",
        "Exp",
        "Erf",
        "Relu",
        "Gelu",
        "Softmax",
        "Softplus",
        "Identity",
    )
)


def complete_shapes(model: ir.Model) -> None:
    """Shapes and types of values that a translation of one torch operator into several nodes left without."""
    for node in model.graph:
        if node.domain or len(node.outputs) != 1:
            continue
        if static_shape(node.outputs[0]) is not None:
            _complete_input_of_squeeze(node)
            continue
        shapes = [static_shape(value) for value in node.inputs]
        if any(shape is None for shape in shapes) or not node.inputs or node.inputs[0] is None:
            continue
        dtype = node.outputs[0].dtype or node.inputs[0].dtype
        if node.op_type == "MatMul":
            left, right = shapes[0] or (), shapes[1] or ()
            if len(left) >= 2 and len(right) >= 2:
                leading = np.broadcast_shapes(left[:-2], right[:-2])
                typed(node.outputs[0], (*leading, left[-2], right[-1]), dtype)
        elif node.op_type == "Unsqueeze":
            axes = node.inputs[1].const_value if len(node.inputs) == 2 and node.inputs[1] is not None else None
            if axes is not None:
                unit = np.expand_dims(np.broadcast_to(0, shapes[0] or ()), tuple(int(axis) for axis in axes.numpy()))
                typed(node.outputs[0], unit.shape, dtype)
        elif node.op_type in COMPARISONS:
            typed(node.outputs[0], np.broadcast_shapes(*(shape or () for shape in shapes)), ir.DataType.BOOL)
        elif node.op_type in _ELEMENTWISE:
            typed(node.outputs[0], np.broadcast_shapes(*(shape or () for shape in shapes)), dtype)


def _complete_input_of_squeeze(node: ir.Node) -> None:
    """torch's unbind is a Squeeze of pieces that have no shapes: that of the result with axes of 1 says theirs."""
    if node.op_type != "Squeeze" or len(node.inputs) != 2:
        return
    (source, axes), after = node.inputs, static_shape(node.outputs[0])
    if source is None or static_shape(source) is not None or axes is None or axes.const_value is None or after is None:
        return
    shape = np.expand_dims(np.broadcast_to(0, after), tuple(int(axis) for axis in axes.const_value.numpy())).shape
    typed(source, shape, node.outputs[0].dtype)
