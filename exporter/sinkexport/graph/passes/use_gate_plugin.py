"""Gates of feed-forward blocks, activation(gate) * up, as GatedActivation nodes of the TensorRT plugin.

It computes in float32 and rounds once, where the operators that it replaces round after each: results differ by those
roundings, to the better.
"""

from __future__ import annotations

import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape, replace_node, split_source
from sinkexport.graph.gates import Gate, find_activations, gate_of
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.operators import DOMAIN, GATED_ACTIVATION
from sinkexport.graph.plugin_linears import ACTIVATIONS
from sinkexport.graph.plugin_nodes import PLUGIN_ATTRIBUTES

HALF = ir.DataType.FLOAT16
WIDTH_MULTIPLE = 8
"""What the kernel takes: plugins/kernels/gated_activation.h."""


class UseGatePlugin(GraphPass):
    """Hand over every float16 gate whose width the kernel takes; others stay as they are."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each with one node."""
        graph, modified = model.graph, False
        for active in find_activations(graph):
            found = gate_of(active) if active.activation in ACTIVATIONS else None
            if found is None or found.gate.dtype != HALF:
                continue
            if known_shape(found.gate)[-1] % WIDTH_MULTIPLE == 0:
                _replace(graph, found)
                modified = True
        return ir.passes.PassResult(model, modified)


def _replace(graph: ir.Graph, found: Gate) -> None:
    b, merged = Builder(graph), split_source([found.gate, found.up])  # the rows gate | up as one matmul made them
    shape = known_shape(found.gate)
    out = b.op(
        GATED_ACTIVATION,
        [found.gate, found.up] if merged is None else [merged],
        shape,
        HALF,
        domain=DOMAIN,
        activation=ACTIVATIONS.index(found.activation),
        width=shape[-1],
        is_merged=int(merged is not None),
        **PLUGIN_ATTRIBUTES,
    )
    replace_node(found.last, b.nodes, [out])
