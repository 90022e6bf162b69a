"""Fold what does not depend on the inputs, and give every value a shape. All other passes rely on both."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants

from sinkexport.graph.builder import COMPARISONS
from sinkexport.graph.edit import static_shape, typed
from sinkexport.graph.graph_pass import GraphPass

SMALL_ELEMENTS = 4096
"""Largest constant that is folded: shapes and indices, never weights."""


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
"""Operators whose result has the broadcast shape of their inputs and the type of the first."""


class FoldConstants(GraphPass):
    """Evaluate shape arithmetic now, and give shapes to values that the translation from torch left without.

    Sequences that torch's converter makes of chunks become Split. Unlike other passes this one may find more when it is
    run again: two casts of gpt_oss, which stay so that bundles keep their bytes.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold, complete shapes, and fold again what needed them."""
        modified = _fold(model) | _complete_shapes(model)
        if any(node.op_type in ("Shape", "CastLike") for node in model.graph):
            modified |= _fold(model) | _complete_shapes(model)
        return ir.passes.PassResult(model, modified)


def _fold(model: ir.Model) -> bool:
    def fold(model: ir.Model) -> Any:
        return fold_constants(model, input_size_limit=SMALL_ELEMENTS, output_size_limit=SMALL_ELEMENTS)

    lift = common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
    steps = (lift, fold, lift, common.IdentityEliminationPass(), common.RemoveUnusedNodesPass())
    return sum(step(model).modified for step in steps) > 0


def _complete_shapes(model: ir.Model) -> bool:
    """Shapes and types of values that a translation of one torch operator into several nodes left without."""
    return sum(_complete(node) for node in model.graph if not node.domain and len(node.outputs) == 1) > 0


def _complete(node: ir.Node) -> bool:
    """Shape and type of a node's result, or of the input of a Squeeze. False: nothing was missing, or can be known."""
    if static_shape(node.outputs[0]) is not None:
        return _complete_input_of_squeeze(node)
    known = [static_shape(value) for value in node.inputs]
    if any(shape is None for shape in known) or not node.inputs or node.inputs[0] is None:
        return False
    shapes = [shape or () for shape in known]
    dtype = node.outputs[0].dtype or node.inputs[0].dtype
    shape: tuple[int, ...] | None = None
    if node.op_type == "MatMul" and min(len(each) for each in shapes) >= 2:
        left, right = shapes
        shape = (*np.broadcast_shapes(left[:-2], right[:-2]), left[-2], right[-1])
    elif node.op_type == "Unsqueeze":
        axes = node.inputs[1].const_value if len(node.inputs) == 2 and node.inputs[1] is not None else None
        shape = None if axes is None else _with_unit_axes(shapes[0], axes)
    elif node.op_type in COMPARISONS:
        shape, dtype = np.broadcast_shapes(*shapes), ir.DataType.BOOL
    elif node.op_type in _ELEMENTWISE:
        shape = np.broadcast_shapes(*shapes)
    if shape is None:
        return False
    typed(node.outputs[0], shape, dtype)
    return True


def _complete_input_of_squeeze(node: ir.Node) -> bool:
    """torch's unbind is a Squeeze of pieces that have no shapes: that of the result with axes of 1 says theirs."""
    if node.op_type != "Squeeze" or len(node.inputs) != 2:
        return False
    (source, axes), after = node.inputs, static_shape(node.outputs[0])
    if source is None or static_shape(source) is not None or axes is None or axes.const_value is None or after is None:
        return False
    typed(source, _with_unit_axes(after, axes.const_value), node.outputs[0].dtype)
    return True


def _with_unit_axes(shape: tuple[int, ...], axes: ir.TensorProtocol) -> tuple[int, ...]:
    """`shape` with axes of 1 where `axes` says, as Unsqueeze does."""
    return np.expand_dims(np.broadcast_to(0, shape), tuple(int(axis) for axis in axes.numpy())).shape
