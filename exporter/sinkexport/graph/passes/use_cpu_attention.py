"""Leave attention to the CPU library: SinkAttention stays one node, which writes its states in place.

What its kernel does not do stays traced, and is written out in standard operators by the next pass: latent caches,
caches that layers share, weights that are changed after the softmax, and rotations of other kinds.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir

from sinkexport.graph.cpu_nodes import is_cpu_node
from sinkexport.graph.edit import drop_unused, known_shape, operand, optional
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.operators import DOMAIN, INT4_LINEAR, INT8_LINEAR, SINK_ATTENTION, VERSION, Input
from sinkexport.graph.whole_attention import make_whole, rotations_of

FLOAT = ir.DataType.FLOAT
DIM_MULTIPLE, MAX_DIM = 8, 1024
"""Sizes of heads that the kernel takes: plugins/cpu/kernels/sink_attention.h."""

OTHERS = (Input.AFFINE_SCALE, Input.AFFINE_BIAS, Input.ATTENTION_MASS, Input.CALIBRATED)
"""Inputs that the kernel has not."""


class UseCpuAttention(GraphPass):
    """Give every traced SinkAttention that the kernel can do its inputs and attributes.

    Where weights are rounded, chunks may multiply in bfloat16: ``bfloat16_chunks``.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each with one node."""
        graph = model.graph
        attentions = [n for n in graph if n.domain == DOMAIN and n.op_type == SINK_ATTENTION and not is_cpu_node(n)]
        owners = Counter(operand(node, Input.WINDOW_K) for node in attentions)
        fitting = [node for node in attentions if owners[operand(node, Input.WINDOW_K)] == 1 and _fits(node)]
        if not fitting:
            return ir.passes.PassResult(model, False)
        drop_unused(graph)  # a view that nothing reads would hide an output's gate
        is_rounded = any(node.domain == DOMAIN and node.op_type in (INT8_LINEAR, INT4_LINEAR) for node in graph)
        for node in fitting:
            # Norms of queries and keys are fused by a pass that runs later.
            fields = {"bfloat16_chunks": int(is_rounded), "has_qk_norm": 0, "qk_norm_epsilon": 0.0}
            make_whole(graph, node, dtype=FLOAT, frequency=np.dtype(np.int64), fields=fields)
        graph.opset_imports[DOMAIN] = VERSION
        drop_unused(graph)  # rotations and angles
        return ir.passes.PassResult(model, True)


def _fits(node: ir.Node) -> bool:
    """Whether the kernel can do it."""
    q, values, window_v = (optional(node, i) for i in (Input.Q, Input.V, Input.WINDOW_V))
    if q is None or values is None or window_v is None or q.dtype != FLOAT or values.dtype != FLOAT:
        return False
    if any(optional(node, i) is not None for i in OTHERS):
        return False
    if any(known_shape(value)[3] % DIM_MULTIPLE or known_shape(value)[3] > MAX_DIM for value in (q, values)):
        return False
    sinks = [optional(node, i) for i in (Input.SINK_K, Input.SINK_V)]
    if any(state is not None and state.dtype != FLOAT for state in sinks):
        return False
    try:
        rotations_of(node)
    except ValueError:
        return False
    return True
