"""The plugin form: SinkAttention stays one node, which TensorRT's parser hands to plugins/trt.

Only what TensorRT 8.5 has too: no int64 input (positions are two int32 words, so that every position that the exact
phase reaches can be told), states that the kernels take (float16, or INT8 for a window), one node for attention with
everything that belongs to it, the rotation of queries and keys included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from sinkrt.errors import UsageError, problem

from sinkexport.graph.attention.parts import operand, optional
from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import constant, is_weight, known_shape, replace_node, typed
from sinkexport.graph.operators import DOMAIN, SINK_ATTENTION, STREAM_ANGLES
from sinkexport.graph.passes.output_gate import absorb, find_output_gate

PLUGIN_ATTRIBUTES: Mapping[str, str] = {"plugin_version": "1", "plugin_namespace": ""}
"""Of every node: by them and its name TensorRT's parser finds the plugin."""

WORD_BITS = 16
"""A position is given as t >> 16 and t & 0xffff."""

HEAD_DIMS = (64, 80, 96, 128, 256)
MAX_BATCH = 64
MAX_CAPACITY = 65536
"""What the kernels are compiled for: plugins/kernels/sink_attention.h."""


def refuse_geometry(head_dim: int, batch: int, capacity: int) -> None:
    """Refuse what the kernels behind the plugin cannot do, before minutes are spent.

    Raises: UsageError.
    """
    native = "use --native, which needs no plugin"
    if head_dim not in HEAD_DIMS:
        raise UsageError(
            problem(
                "head size",
                received=head_dim,
                fix=native,
                expected="one that the plugin has kernels for: " + ", ".join(map(str, HEAD_DIMS)),
            )
        )
    if batch > MAX_BATCH:
        raise UsageError(
            problem(
                "batch",
                received=batch,
                expected=f"at most {MAX_BATCH} with the plugin",
                fix=f"lower --batch, or {native}",
            )
        )
    if capacity > MAX_CAPACITY:
        raise UsageError(
            problem(
                "sinks + window",
                received=f"{capacity} tokens",
                fix=f"lower --window, or {native}",
                expected=f"at most {MAX_CAPACITY} tokens with the plugin",
            )
        )


def use_plugins(model: ir.Model) -> None:
    """Give the traced graph the form above. Its first inputs are ids and position, its last one may be num_valid.

    ids int64 -> int32; position int64 [B] -> int32 [B, 2]; num_valid int64 [B] -> int32; float states -> float16.
    """
    graph = model.graph
    ids, position = graph.inputs[:2]
    attentions = [node for node in graph if node.domain == DOMAIN and node.op_type == SINK_ATTENTION]
    num_valid = optional(attentions[0], 10)
    _drop_unused(graph)  # a view that nothing reads would hide an output's gate
    for node in attentions:
        _use_plugin(graph, node)
    _drop_unused(graph)  # rotations and angles
    if num_valid is not None:
        _select_last_token(graph, num_valid)
        _narrow(graph, num_valid, ("Sub",))  # that of the selection
    _split_position(graph, position)
    _narrow_ids(graph, ids)
    if left := [node.op_type for node in graph if node.domain == DOMAIN and node.op_type == STREAM_ANGLES]:
        raise ValueError(f"{len(left)} {STREAM_ANGLES} nodes belong to no rotation that attention could do itself")


@dataclasses.dataclass(frozen=True)
class _Rotation:
    """x: what is rotated. frequency: int64 [R/2], constant. scaling: factor on cos and sin."""

    x: ir.Value
    frequency: np.ndarray
    scaling: float
    interleaved: bool


def _use_plugin(graph: ir.Graph, node: ir.Node) -> None:
    half = ir.DataType.FLOAT16
    b, dtype = Builder(graph), operand(node, 0).dtype
    q, k, v = (operand(node, i) for i in range(3))
    turned = [_rotation(value) for value in (q, k)]
    rotation = turned[0]
    if (rotation is None) != (turned[1] is None) or (rotation is None and optional(node, 8) is not None):
        raise ValueError(f"'{node.name}': queries and keys are rotated in a way that attention cannot do itself")
    if rotation is not None and turned[1] is not None:
        q, k = rotation.x, turned[1].x
    window = [operand(node, i) for i in (5, 6)]
    is_int8 = window[0].dtype == ir.DataType.INT8
    scales = [operand(node, i) for i in (11, 12)] if is_int8 else []
    sinks = [] if optional(node, 3) is None else [operand(node, i) for i in (3, 4)]
    states = [*window, *scales, *sinks]
    for state in states:
        if state.dtype == ir.DataType.FLOAT:
            state.dtype = half
    inputs = [*(b.cast(value, half) for value in (q, k, v)), operand(node, 7), *states]
    if rotation is not None:
        bits = rotation.frequency.astype(np.uint32).view(np.int32)
        inputs.append(constant(graph, bits, "frequency"))
    num_valid, slopes, sink_logit, sink_scale = (optional(node, i) for i in (10, 13, 14, 15))
    if num_valid is not None:
        inputs.append(num_valid)
    inputs += [_float32(b, value) for value in (slopes, sink_logit, sink_scale) if value is not None]
    if (gate := find_output_gate(node)) is not None:
        inputs.append(b.cast(absorb(b, gate, known_shape(q)[1]), half))
    attributes: dict[str, float | int | str] = {
        "scale": node.attributes["scale"].as_float(),
        "softcap": node.attributes["softcap"].as_float(),
        "rope_scaling": 1.0 if rotation is None else rotation.scaling,
        "packed_width": 0,
        "rotary_dim": 0 if rotation is None else 2 * rotation.frequency.size,
        "interleaved": int(rotation is not None and rotation.interleaved),
        "num_sinks": known_shape(sinks[0])[2] if sinks else 0,
        "int8_window": int(is_int8),
        "has_num_valid": int(num_valid is not None),
        "has_alibi": int(slopes is not None),
        "has_sink_logit": int(sink_logit is not None),
        "has_sink_scale": int(sink_scale is not None),
        "has_gate": int(gate is not None),
        **PLUGIN_ATTRIBUTES,
    }
    plugin = ir.node(SINK_ATTENTION, inputs, attributes, domain=DOMAIN, num_outputs=1 + len(states))
    b.nodes.append(plugin)
    out, *after = (
        typed(new, known_shape(old), old.dtype) for new, old in zip(plugin.outputs, [inputs[0], *states], strict=True)
    )
    by_kind = dict(
        zip(
            ("window", "scales", "sinks"),
            (after[:2], after[2 : 2 + len(scales)], after[2 + len(scales) :]),
            strict=True,
        )
    )
    outputs: list[ir.Value | None] = [b.cast(out, dtype or half)]
    outputs += by_kind["sinks"] or [None, None]
    outputs += by_kind["window"]
    outputs += by_kind["scales"] or [None, None]
    outputs.append(None)  # attention_mass: the exporter refuses what needs it
    replace_node(node, b.nodes, outputs)


def _float32(b: Builder, value: ir.Value) -> ir.Value:
    """One number for each query head, [Hq], as the kernels read it: constants are converted here."""
    if is_weight(value) and value.const_value is not None and value.dtype != ir.DataType.FLOAT:
        return constant(b.graph, value.const_value.numpy().astype(np.float32), "by_head")
    return b.cast(value, ir.DataType.FLOAT)


def _drop_unused(graph: ir.Graph) -> None:
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)


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


def _select_last_token(graph: ir.Graph, num_valid: ir.Value) -> None:
    """GatherElements of the last token that counts, [1, T, N] -> [1, 1, N], becomes a Gather with an int32 index.

    TensorRT 8.5 neither clips integers nor has int64.
    """
    for node in list(graph):
        if node.op_type != "GatherElements" or node.domain:
            continue
        values = operand(node, 0)
        batch, _, width = known_shape(values)
        if batch != 1:
            raise ValueError(f"a chunk of {batch} streams")
        b = Builder(graph)
        one, zero = (constant(graph, np.array([n], np.int32), hint) for n, hint in ((1, "one"), (0, "zero")))
        last = b.op("Max", [b.op("Sub", [num_valid, one], (1,), ir.DataType.INT32), zero])
        replace_node(node, b.nodes, [b.op("Gather", [values, last], (1, 1, width), values.dtype, axis=1)])
    _drop_unused(graph)


def _split_position(graph: ir.Graph, position: ir.Value) -> None:
    """int64 [B] -> int32 [B, 2]. What else asks for the position only asks whether a token is a sink, one of the first
    S < 65536: it gets min(t >> 16, 1) * 65536 + (t & 0xffff)."""
    others = [use for use in position.uses() if use.node.domain != DOMAIN]
    (batch,) = known_shape(position)
    typed(position, (batch, 2), ir.DataType.INT32)
    if not others:
        return
    b = Builder(graph)
    high, low = b.split(position, [1, 1], 1)
    one, word = (constant(graph, np.array(n, np.int32), hint) for n, hint in ((1, "one"), (1 << WORD_BITS, "word")))
    small = b.op("Add", [b.op("Mul", [b.op("Min", [high, one]), word]), low])
    small = b.cast(b.reshape(small, (batch,)), ir.DataType.INT64)
    for use in others:
        use.node.replace_input_with(use.idx, small)
    graph.insert_before(graph[0], b.nodes)


def _narrow_ids(graph: ir.Graph, ids: ir.Value) -> None:
    """int64 -> int32: indices of a Gather may be either, Int8Rows wants it. So may what is compared with a constant."""
    for use in ids.uses():
        other = use.node.inputs[1 - use.idx] if use.node.op_type in ("Greater", "Max") else None
        if other is None or other.const_value is None:
            continue
        narrow = constant(graph, other.const_value.numpy().astype(np.int32), "id")
        use.node.replace_input_with(1 - use.idx, narrow)
        if use.node.op_type == "Max":
            _narrow_ids(graph, use.node.outputs[0])
    _narrow(graph, ids, ("Gather", "Greater", "Max"))


def _narrow(graph: ir.Graph, value: ir.Value, takers: Sequence[str]) -> None:
    """int64 -> int32: `takers` and the plugin's nodes take it so, anything else gets int64 as before."""
    others = [use for use in value.uses() if use.node.op_type not in takers and use.node.domain != DOMAIN]
    value.dtype = ir.DataType.INT32
    if not others:
        return
    b = Builder(graph)
    wide = b.cast(value, ir.DataType.INT64)
    producer = value.producer()
    for use in others:
        use.node.replace_input_with(use.idx, wide)
    if producer is None:
        graph.insert_before(graph[0], b.nodes)
    else:
        graph.insert_after(producer, b.nodes)
