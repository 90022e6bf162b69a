"""SinkAttention as one node of a kernel library: rotation, output gate and states included.

The TensorRT plugin and the CPU library take the same inputs in the same order, in types of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import constant, is_weight, known_shape, operand, optional, replace_node, typed
from sinkexport.graph.operators import DOMAIN, SINK_ATTENTION, STREAM_ANGLES, Input
from sinkexport.graph.output_gate import absorb, find_output_gate
from sinkexport.graph.turned_weights import TurnedWeight

HANDS_OUT = 2
"""Value of the field ``reads_only`` of a node that hands out the rows which it would write."""


@dataclasses.dataclass(frozen=True)
class Rotation:
    """x: what is rotated. frequency: int64 [R/2], constant. scaling: factor on cos and sin."""

    x: ir.Value
    frequency: np.ndarray
    scaling: float
    interleaved: bool

    def is_like(self, other: Rotation) -> bool:
        """Whether both turn by the same angles."""
        is_same = (self.scaling, self.interleaved) == (other.scaling, other.interleaved)
        return is_same and np.array_equal(self.frequency, other.frequency)


def _is_whole(turned: TurnedWeight, of_keys: Rotation) -> bool:
    is_same = turned.interleaved == of_keys.interleaved and np.array_equal(turned.frequency, of_keys.frequency)
    return is_same and of_keys.scaling == 1.0


def rotation_of(value: ir.Value) -> Rotation | None:
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
    return Rotation(x, frequency.numpy(), scaling, bool(interleaved))


def rotations_of(node: ir.Node, turned: TurnedWeight | None = None) -> tuple[Rotation, Rotation] | None:
    """Rotations of queries and keys. turned: of queries whose rotation is in two parts, that of all of it is the keys'.

    None: there are none. Raises: ValueError if these are of a kind that attention cannot do itself.
    """
    of_queries, of_keys = (rotation_of(operand(node, i)) for i in (Input.Q, Input.K))
    if turned is not None and of_keys is not None:
        if not _is_whole(turned, of_keys):
            raise ValueError(f"'{node.name}': queries turn by other angles than keys")
        return dataclasses.replace(of_keys, x=turned.x), of_keys
    if of_queries is not None and of_keys is not None:
        if not of_queries.is_like(of_keys):
            raise ValueError(f"'{node.name}': queries turn by other angles than keys")
        return of_queries, of_keys
    if of_queries is not of_keys or optional(node, Input.SHIFT_COS) is not None:
        raise ValueError(f"'{node.name}': queries and keys are rotated in a way that attention cannot do itself")
    return None


@dataclasses.dataclass(frozen=True)
class Shared:
    """How a node reads states that another one writes.

    states: as it reads them. takes_keys: whether they lack its tokens, whose keys and values it then takes.
    hands_out: whether the rows of these tokens are outputs in place of the states.
    """

    states: States
    takes_keys: bool
    hands_out: bool = False


@dataclasses.dataclass(frozen=True)
class States:
    """States of one node, two of a kind or none, in the order in which kernels have them."""

    window: list[ir.Value]
    scales: list[ir.Value]
    sinks: list[ir.Value]

    @property
    def all(self) -> list[ir.Value]:
        """In the order of inputs and outputs."""
        return [*self.window, *self.scales, *self.sinks]

    def new_rows(self, num_tokens: int) -> States:
        """Values like the rows of so many tokens, without names. Sinks and a window of one type have the same rows."""

        def rows(state: ir.Value) -> ir.Value:
            batch, heads, _, *size = known_shape(state)
            return typed(ir.Value(), (batch, heads, num_tokens, *size), state.dtype)

        return States(
            [rows(x) for x in self.window], [rows(x) for x in self.scales], [rows(x) for x in self.sinks if self.scales]
        )

    def after(self, node: ir.Node) -> States:
        """What a node of a library makes of them."""
        after = list(node.outputs[1:])
        ends = [len(self.window), len(self.window) + len(self.scales)]
        return States(after[: ends[0]], after[ends[0] : ends[1]], after[ends[1] :])

    @classmethod
    def of(cls, node: ir.Node) -> States:
        """The states of a traced node."""
        window = [operand(node, i) for i in (Input.WINDOW_K, Input.WINDOW_V)]
        is_int8 = window[0].dtype == ir.DataType.INT8
        scales = [operand(node, i) for i in (Input.WINDOW_K_SCALE, Input.WINDOW_V_SCALE)] if is_int8 else []
        has_sinks = optional(node, Input.SINK_K) is not None
        sinks = [operand(node, i) for i in (Input.SINK_K, Input.SINK_V)] if has_sinks else []
        return cls(window, scales, sinks)


def make_whole(
    graph: ir.Graph,
    node: ir.Node,
    *,
    dtype: ir.DataType,
    frequency: np.dtype,
    fields: Mapping[str, float | int | str],
    turned: TurnedWeight | None = None,
    shared: Shared | None = None,
) -> ir.Node:
    """Replace a traced node. dtype: of all but the states, scales and numbers of heads. frequency: its type's bits.

    fields: attributes beside those that both libraries have. turned: weights between two parts of the queries'
    rotation. shared: the node only reads its states; it has no states among its outputs then. Returns: the new node.

    Raises: ValueError if queries and keys are rotated in a way that attention cannot do itself.
    """
    b, result = Builder(graph), operand(node, Input.Q).dtype
    states = States.of(node) if shared is None else shared.states
    rotations = rotations_of(node, turned)
    q, k = (r.x for r in rotations) if rotations else (operand(node, i) for i in (Input.Q, Input.K))
    tokens = [q] if shared is not None and not shared.takes_keys else [q, k, operand(node, Input.V)]
    inputs = [*(b.cast(value, dtype) for value in tokens), operand(node, Input.POSITION)]
    inputs += states.all
    if rotations:
        turns = rotations[0].frequency  # below 2^32
        bits = turns if frequency == turns.dtype else turns.astype(np.uint32).view(frequency)
        inputs.append(constant(graph, bits, "frequency"))
    optional_ones = {
        "has_num_valid": optional(node, Input.NUM_VALID),
        "has_alibi": _float32(b, optional(node, Input.ALIBI_SLOPES)),
        "has_sink_logit": _float32(b, optional(node, Input.SINK_LOGIT)),
        "has_sink_scale": _float32(b, optional(node, Input.SINK_SCALE)),
        "has_gate": None,
    }
    if (gate := find_output_gate(node)) is not None:
        optional_ones["has_gate"] = b.cast(absorb(b, gate, known_shape(q)[1]), dtype)
    inputs += [value for value in optional_ones.values() if value is not None]
    inputs += [] if turned is None else turned.weights
    rotation = rotations[0] if rotations else None
    attributes: dict[str, float | int | str] = {
        "scale": node.attributes["scale"].as_float(),
        "softcap": node.attributes["softcap"].as_float(),
        "rope_scaling": 1.0 if rotation is None else rotation.scaling,
        "packed_width": 0,
        "rotary_dim": 0 if rotation is None else 2 * rotation.frequency.size,
        "interleaved": int(rotation is not None and rotation.interleaved),
        "num_sinks": known_shape(states.sinks[0])[2] if states.sinks else 0,
        "int8_window": int(bool(states.scales)),
        **{name: int(value is not None) for name, value in optional_ones.items()},
        **fields,
    }
    if shared is not None and shared.hands_out:
        return _replace(node, b, inputs, attributes, states.new_rows(known_shape(q)[2]), (dtype, result or dtype))
    written = states if shared is None else States([], [], [])
    return _replace(node, b, inputs, attributes, written, (dtype, result or dtype))


def _replace(
    node: ir.Node,
    b: Builder,
    inputs: list[ir.Value],
    attributes: dict[str, float | int | str],
    written: States,
    dtypes: tuple[ir.DataType, ir.DataType],
) -> ir.Node:
    """written: what values the outputs after the result are like. dtypes: of the result, and of the old node's."""
    whole = ir.node(SINK_ATTENTION, inputs, attributes, domain=DOMAIN, num_outputs=1 + len(written.all))
    b.nodes.append(whole)
    shape = (*known_shape(inputs[0])[:3], known_shape(operand(node, Input.V))[3])
    typed(whole.outputs[0], shape, dtypes[0])
    out, *after = whole.outputs
    for new, old in zip(after, written.all, strict=True):
        typed(new, known_shape(old), old.dtype)
    none: list[ir.Value | None] = [None, None]
    now = written.after(whole)
    sinks = now.window if hands_out_rows(whole) and optional(node, Input.SINK_K) is not None else none
    outputs = [b.cast(out, dtypes[1]), *(now.sinks or sinks or none), *(now.window or none), *(now.scales or none)]
    outputs.append(None)  # attention_mass: who calls has made sure that there is none
    replace_node(node, b.nodes, outputs)
    return whole


def hands_out_rows(node: ir.Node) -> bool:
    """Whether a node of a library has the rows of its tokens among its outputs, in place of states."""
    return "reads_only" in node.attributes and node.attributes["reads_only"].as_int() == HANDS_OUT


def _float32(b: Builder, value: ir.Value | None) -> ir.Value | None:
    """One number for each query head, [Hq], as the kernels read it: constants are converted here."""
    if value is None:
        return None
    if is_weight(value) and value.const_value is not None and value.dtype != ir.DataType.FLOAT:
        return constant(b.graph, value.const_value.numpy().astype(np.float32), "by_head")
    return b.cast(value, ir.DataType.FLOAT)
