"""Leave attention to the TensorRT plugin: SinkAttention stays one node, which the parser hands to plugins/trt.

The node does everything that belongs to attention, the rotation of queries and keys and an output gate included.
Its states are those that the kernels take: float16, or INT8 for a window.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sinkexport.graph.edit import drop_unused
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.operators import DOMAIN, SINK_ATTENTION, STREAM_ANGLES
from sinkexport.graph.plugin_nodes import PLUGIN_ATTRIBUTES, is_plugin, no_plugin_form
from sinkexport.graph.whole_attention import States, make_whole, rotations_of

HALF = ir.DataType.FLOAT16


class UseAttentionPlugin(GraphPass):
    """Give every traced SinkAttention the inputs and attributes of the plugin.

    float32 states become float16. The position stays as it is: `use_int32_inputs` follows.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each with one node.

        Raises: NoPluginFormError if queries and keys are rotated in a way that the plugin has not.
        """
        graph = model.graph
        attentions = [n for n in graph if n.domain == DOMAIN and n.op_type == SINK_ATTENTION and not is_plugin(n)]
        if not attentions:
            return ir.passes.PassResult(model, False)
        drop_unused(graph)  # a view that nothing reads would hide an output's gate
        for node in attentions:
            _use_plugin(graph, node)
        drop_unused(graph)  # rotations and angles
        if left := [node.op_type for node in graph if node.domain == DOMAIN and node.op_type == STREAM_ANGLES]:
            raise no_plugin_form(f"{len(left)} {STREAM_ANGLES} nodes of no rotation that attention could do itself")
        return ir.passes.PassResult(model, True)


def _use_plugin(graph: ir.Graph, node: ir.Node) -> None:
    try:
        rotations_of(node)
    except ValueError as error:
        raise no_plugin_form(str(error)) from error
    for state in States.of(node).all:
        if state.dtype == ir.DataType.FLOAT:
            state.dtype = HALF
    make_whole(graph, node, dtype=HALF, frequency=np.dtype(np.int32), fields={**PLUGIN_ATTRIBUTES})
