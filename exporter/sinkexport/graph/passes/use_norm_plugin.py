"""Norms as RmsNorm nodes of the TensorRT plugin, with the residual addition in front of them.

TensorRT would compile a kernel of its own for each such gap between two matmuls. A node rounds where the operators
that it replaces round: the sum once, before it is normalised; the normalised values before they are multiplied by
weights of float16, or, where weights are float32 (Gemma), the result once.
"""

from __future__ import annotations

import onnx_ir as ir

from sinkexport.graph.edit import known_shape, only_user, replace_node, typed
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.operators import DOMAIN, RMS_NORM
from sinkexport.graph.plugin_nodes import PLUGIN_ATTRIBUTES
from sinkexport.graph.rms_norms import RmsNorm, find_rms_norms

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
LENGTH_MULTIPLE, MAX_LENGTH = 8, 32768
"""What the kernel takes: plugins/kernels/rms_norm.h."""


class UseNormPlugin(GraphPass):
    """Hand over every float16 norm over the last axis whose width the kernel takes; others stay as they are."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each, and the addition before it, with one node."""
        modified = False
        for norm in find_rms_norms(model.graph):
            last = _rounding(norm)
            length = known_shape(norm.x)[-1]
            if norm.x.dtype == HALF and last is not None and length % LENGTH_MULTIPLE == 0 and length <= MAX_LENGTH:
                _replace(norm, last)
                modified = True
        return ir.passes.PassResult(model, modified)


def _rounding(norm: RmsNorm) -> ir.Node | None:
    """The node that ends the norm with a result of float16; None: it is of another kind."""
    result = norm.last.outputs[0]
    if norm.scale.dtype == result.dtype == HALF:
        return norm.last
    if norm.scale.dtype != FLOAT or result.dtype != FLOAT:
        return None
    cast = only_user(result, "Cast")
    return cast if cast is not None and cast.outputs[0].dtype == HALF else None


def _replace(norm: RmsNorm, last: ir.Node) -> None:
    addition = _addition(norm.x)
    inputs = [norm.x, norm.scale] if addition is None else [addition.inputs[0], norm.scale, addition.inputs[1]]
    node = ir.node(
        RMS_NORM,
        inputs,
        {
            "epsilon": norm.epsilon,
            "has_residual": int(addition is not None),
            "float_weight": int(norm.scale.dtype == FLOAT),
            **PLUGIN_ATTRIBUTES,
        },
        domain=DOMAIN,
        num_outputs=1 if addition is None else 2,
    )
    for output in node.outputs:
        typed(output, known_shape(norm.x), HALF)
    if addition is None:
        replace_node(last, [node], node.outputs)
        return
    replace_node(addition, [node], node.outputs[1:])
    replace_node(last, [], node.outputs[:1])


def _addition(x: ir.Value) -> ir.Node | None:
    """The Add of two tensors of float16, alike in shape, that makes x."""
    node = x.producer()
    if node is None or node.op_type != "Add" or node.domain:
        return None
    alike = all(v is not None and v.dtype == HALF and known_shape(v) == known_shape(x) for v in node.inputs)
    return node if alike else None
