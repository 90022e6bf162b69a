"""Gates of feed-forward blocks, activation(gate) * up, as GatedActivation nodes of the TensorRT plugin.

It computes in float32 and rounds once, where the operators that it replaces round after each: results differ by those
roundings, to the better.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape, only_user, replace_node, split_source
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.operators import DOMAIN, GATED_ACTIVATION
from sinkexport.graph.plugin_nodes import PLUGIN_ATTRIBUTES

HALF = ir.DataType.FLOAT16
WIDTH_MULTIPLE = 8
"""What the kernel takes: plugins/kernels/gated_activation.h."""
SILU, GELU, GELU_TANH = range(3)


@dataclasses.dataclass(frozen=True)
class _Gate:
    """``activation(gate) * up``, ending in node `last`."""

    gate: ir.Value
    up: ir.Value
    activation: int
    last: ir.Node


class UseGatePlugin(GraphPass):
    """Hand over every float16 gate whose width the kernel takes; others stay as they are."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each with one node."""
        graph, modified = model.graph, False
        for node in list(graph):
            found = _match(node)
            if found is not None and known_shape(found.gate)[-1] % WIDTH_MULTIPLE == 0:
                _replace(graph, found)
                modified = True
        return ir.passes.PassResult(model, modified)


def _match(node: ir.Node) -> _Gate | None:
    """The gate whose activation begins with `node`."""
    if node.domain or node.op_type not in ("Gelu", "Sigmoid") or node.inputs[0] is None:
        return None
    gate, active, activation = node.inputs[0], node, SILU
    if node.op_type == "Gelu":
        approximate = node.attributes["approximate"].as_string() if "approximate" in node.attributes else "none"
        activation = GELU_TANH if approximate == "tanh" else GELU
    else:
        multiplied = only_user(node.outputs[0], "Mul")
        if multiplied is None or gate not in multiplied.inputs:
            return None
        active = multiplied
    last = only_user(active.outputs[0], "Mul")
    if last is None:
        return None
    up = last.inputs[1] if last.inputs[0] is active.outputs[0] else last.inputs[0]
    if up is None or gate.dtype != HALF or up.dtype != HALF or known_shape(up) != known_shape(gate):
        return None
    return _Gate(gate, up, activation, last)


def _replace(graph: ir.Graph, found: _Gate) -> None:
    b, merged = Builder(graph), split_source([found.gate, found.up])  # the rows gate | up as one matmul made them
    shape = known_shape(found.gate)
    out = b.op(
        GATED_ACTIVATION,
        [found.gate, found.up] if merged is None else [merged],
        shape,
        HALF,
        domain=DOMAIN,
        activation=found.activation,
        width=shape[-1],
        is_merged=int(merged is not None),
        **PLUGIN_ATTRIBUTES,
    )
    replace_node(found.last, b.nodes, [out])
