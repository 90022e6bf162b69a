"""Leave attention to the TensorRT plugin: SinkAttention stays one node, which the parser hands to plugins/trt.

The node does everything that belongs to attention, the rotation of queries and keys and an output gate included.
Its states are those that the kernels take: float16, or INT8 for a window.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import constant, drop_unused, is_weight, known_shape, operand, optional, replace_node, typed
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.operators import DOMAIN, SINK_ATTENTION, STREAM_ANGLES, Input
from sinkexport.graph.output_gate import absorb, find_output_gate
from sinkexport.graph.plugin_nodes import PLUGIN_ATTRIBUTES, is_plugin, no_plugin_form

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


@dataclasses.dataclass(frozen=True)
class _Rotation:
    """x: what is rotated. frequency: int64 [R/2], constant. scaling: factor on cos and sin."""

    x: ir.Value
    frequency: np.ndarray
    scaling: float
    interleaved: bool


def _use_plugin(graph: ir.Graph, node: ir.Node) -> None:
    b, dtype = Builder(graph), operand(node, Input.Q).dtype
    states = _states(node)
    inputs, attributes = _operands(b, node, states)
    plugin = ir.node(SINK_ATTENTION, inputs, attributes, domain=DOMAIN, num_outputs=1 + len(states.all))
    b.nodes.append(plugin)
    out, *after = (
        typed(new, known_shape(old), old.dtype)
        for new, old in zip(plugin.outputs, [inputs[0], *states.all], strict=True)
    )
    ends = [len(states.window), len(states.window) + len(states.scales)]
    window, scales, sinks = after[: ends[0]], after[ends[0] : ends[1]], after[ends[1] :]
    outputs: list[ir.Value | None] = [b.cast(out, dtype or HALF)]
    outputs += sinks or [None, None]
    outputs += window
    outputs += scales or [None, None]
    outputs.append(None)  # attention_mass: the exporter refuses what needs it
    replace_node(node, b.nodes, outputs)


@dataclasses.dataclass(frozen=True)
class _States:
    """States of one node, two of a kind or none, in the order in which the plugin has them."""

    window: list[ir.Value]
    scales: list[ir.Value]
    sinks: list[ir.Value]

    @property
    def all(self) -> list[ir.Value]:
        return [*self.window, *self.scales, *self.sinks]


def _states(node: ir.Node) -> _States:
    """The node's states; those of float32 become float16."""
    window = [operand(node, i) for i in (Input.WINDOW_K, Input.WINDOW_V)]
    is_int8 = window[0].dtype == ir.DataType.INT8
    scales = [operand(node, i) for i in (Input.WINDOW_K_SCALE, Input.WINDOW_V_SCALE)] if is_int8 else []
    has_sinks = optional(node, Input.SINK_K) is not None
    sinks = [operand(node, i) for i in (Input.SINK_K, Input.SINK_V)] if has_sinks else []
    states = _States(window, scales, sinks)
    for state in states.all:
        if state.dtype == ir.DataType.FLOAT:
            state.dtype = HALF
    return states


def _operands(b: Builder, node: ir.Node, states: _States) -> tuple[list[ir.Value], dict[str, float | int | str]]:
    """Inputs and attributes of the plugin's node."""
    q, k, v = (operand(node, i) for i in (Input.Q, Input.K, Input.V))
    turned = [_rotation(value) for value in (q, k)]
    rotation = turned[0]
    if (rotation is None) != (turned[1] is None) or (rotation is None and optional(node, Input.SHIFT_COS) is not None):
        raise no_plugin_form(f"'{node.name}', with queries and keys rotated in a way that attention cannot do itself")
    if rotation is not None and turned[1] is not None:
        q, k = rotation.x, turned[1].x
    inputs = [*(b.cast(value, HALF) for value in (q, k, v)), operand(node, Input.POSITION), *states.all]
    if rotation is not None:
        bits = rotation.frequency.astype(np.uint32).view(np.int32)
        inputs.append(constant(b.graph, bits, "frequency"))
    num_valid, slopes = optional(node, Input.NUM_VALID), optional(node, Input.ALIBI_SLOPES)
    sink_logit, sink_scale = optional(node, Input.SINK_LOGIT), optional(node, Input.SINK_SCALE)
    if num_valid is not None:
        inputs.append(num_valid)
    inputs += [_float32(b, value) for value in (slopes, sink_logit, sink_scale) if value is not None]
    if (gate := find_output_gate(node)) is not None:
        inputs.append(b.cast(absorb(b, gate, known_shape(q)[1]), HALF))
    attributes: dict[str, float | int | str] = {
        "scale": node.attributes["scale"].as_float(),
        "softcap": node.attributes["softcap"].as_float(),
        "rope_scaling": 1.0 if rotation is None else rotation.scaling,
        "packed_width": 0,
        "rotary_dim": 0 if rotation is None else 2 * rotation.frequency.size,
        "interleaved": int(rotation is not None and rotation.interleaved),
        "num_sinks": known_shape(states.sinks[0])[2] if states.sinks else 0,
        "int8_window": int(bool(states.scales)),
        "has_num_valid": int(num_valid is not None),
        "has_alibi": int(slopes is not None),
        "has_sink_logit": int(sink_logit is not None),
        "has_sink_scale": int(sink_scale is not None),
        "has_gate": int(gate is not None),
        **PLUGIN_ATTRIBUTES,
    }
    return inputs, attributes


def _float32(b: Builder, value: ir.Value) -> ir.Value:
    """One number for each query head, [Hq], as the kernels read it: constants are converted here."""
    if is_weight(value) and value.const_value is not None and value.dtype != ir.DataType.FLOAT:
        return constant(b.graph, value.const_value.numpy().astype(np.float32), "by_head")
    return b.cast(value, ir.DataType.FLOAT)


def _rotation(value: ir.Value) -> _Rotation | None:
    """What `value` is a rotation of by its own positions; None: of nothing."""
    node = value.producer()
    if node is None or node.op_type != "RotaryEmbedding" or node.domain:
        return None
    x, cos = operand(node, 0), operand(node, 1)
    scaling, source = 1.0, cos.producer()
    while source is not None and not source.domain and source.op_type in ("Cast", "Mul"):
        if source.op_type == "Mul":
            factor = next((v for v in source.inputs if v is not None and v.const_value is not None), None)
            if factor is None or factor.const_value is None or factor.const_value.size != 1:
                return None
            scaling *= float(factor.const_value.numpy().reshape(()))
        source = next((v for v in source.inputs if v is not None and v.const_value is None), cos).producer()
    if source is None or source.op_type != STREAM_ANGLES or source.attributes["behind"].as_int() != 0:
        return None
    frequency = operand(source, 1).const_value
    if frequency is None:
        return None
    interleaved = node.attributes["interleaved"].as_int() if "interleaved" in node.attributes else 0
    return _Rotation(x, frequency.numpy(), scaling, bool(interleaved))
