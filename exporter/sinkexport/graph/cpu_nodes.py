"""Nodes of the CPU library (plugins/cpu) as values: read from a graph, changed, and written again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape, operand
from sinkexport.graph.operators import (
    BF16_EXPERT_LINEAR,
    BF16_LINEAR,
    BF16_ROWS,
    DOMAIN,
    FLOAT_EXPERT_LINEAR,
    FLOAT_LINEAR,
    FLOAT_ROWS,
    INT4_LINEAR,
    INT4_ROWS,
    INT8_EXPERT_LINEAR,
    INT8_LINEAR,
    INT8_ROWS,
    SINK_ATTENTION,
    VERSION,
)
from sinkexport.graph.packed_weights import (
    LAYOUT,
    ROW_ORDER,
    SCALE_TYPES,
    PackedMatrix,
    packed_source,
    shown_order,
)
from sinkexport.util.node_fields import FIELDS, read_fields

ALL_TOKENS: Mapping[str, int] = {"num_tokens": 0, "repeats_last": 0}
"""Fields of a matmul that computes all rows: the last pass but one changes them (skip_cpu_padding)."""

BITS_OF_LINEARS: Mapping[str, int] = {FLOAT_LINEAR: 32, BF16_LINEAR: 16, INT8_LINEAR: 8, INT4_LINEAR: 4}
BITS_OF_ROWS: Mapping[str, int] = {FLOAT_ROWS: 32, BF16_ROWS: 16, INT8_ROWS: 8, INT4_ROWS: 4}
BITS_OF_EXPERTS: Mapping[str, int] = {FLOAT_EXPERT_LINEAR: 32, BF16_EXPERT_LINEAR: 16, INT8_EXPERT_LINEAR: 8}
RMS, LAYER_NORM = 1, 2
"""Values of a linear's field ``norm``."""

OTHER_MATMULS = {
    *("MatMul", "Einsum", "Loop", "Scan"),
    *("MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits", "DynamicQuantizeMatMul"),
}
"""Operators that a chunk takes long for, by name. Convolutions of few tokens and routers (Gemm) are none."""

_FUSED = {
    "norm": "norm_weight",
    "has_norm_bias": "norm_bias",
    "has_bias": "bias",
    "output_norm": "output_norm_weight",
    "has_residual": "residual",
}
"""Inputs that follow the weights, in their order, by the fields that say whether they are there."""

_FUSED_OF_EXPERTS = {
    "norm": "norm_weight",
    "has_bias": "bias",
    "has_pick_weights": "pick_weights",
    "has_residual": "residual",
}
"""The same of matmuls by chosen matrices."""

AS_FIELDS = (
    *("in_features", "out_features", "block_size", "norm_epsilon"),
    *("activation", "activation_limit", "multiplier"),
)
"""Facts of a matmul that are fields of the same name."""

WITH_SCALES = (INT8_LINEAR, INT4_LINEAR, INT8_EXPERT_LINEAR)


def is_cpu_node(node: ir.Node) -> bool:
    """Whether a node is in the form that the CPU library takes."""
    if node.domain != DOMAIN:
        return False
    if FIELDS in node.attributes:
        return True
    if node.op_type == SINK_ATTENTION:
        return "bfloat16_chunks" in node.attributes
    return "layout" in node.attributes  # of the plugin's nodes some have the same names


def has_other_matmuls(graph: ir.Graph) -> bool:
    """Whether matmuls or recurrences are left to other operators, which compute rows of a chunk without a token too."""
    return any(node.op_type in OTHER_MATMULS for node in graph)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CpuMatmul:
    """What matmuls by one matrix and by chosen ones share.

    weights: packed bytes, then scales and zero points if there are any. in_features, out_features: of x and y.
    norm_weight: [K] of an RMS norm of x, or of a layer norm.
    """

    op_type: str
    x: ir.Value
    weights: tuple[ir.Value, ...]
    in_features: int
    out_features: int
    block_size: int
    norm_weight: ir.Value | None = None
    norm_epsilon: float = 0.0
    is_layer_norm: bool = False
    bias: ir.Value | None = None
    activation: str = "none"
    activation_limit: float = 0.0
    is_gated: bool = False
    multiplier: float = 1.0
    residual: ir.Value | None = None

    @property
    def matrix(self) -> PackedMatrix | None:
        """What the weights are made of; None: in a graph that came from a file."""
        return packed_source(self.weights[0])

    @property
    def shares_weights(self) -> bool:
        """Whether other nodes read the weights too."""
        return any(len(list(value.uses())) > 1 for value in self.weights)

    def _fields(self) -> dict[str, int | float | str]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            **_weight_fields(self.weights, self.block_size),
            "norm": 0 if self.norm_weight is None else LAYER_NORM if self.is_layer_norm else RMS,
            "norm_epsilon": float(self.norm_epsilon),
            "has_bias": int(self.bias is not None),
            "has_residual": int(self.residual is not None),
            "activation": self.activation,
            "activation_limit": float(self.activation_limit),
            "gated": int(self.is_gated),
            "multiplier": float(self.multiplier),
            **ALL_TOKENS,
            **_row_order(self.matrix),
        }


def _read(node: ir.Node, first: int, optional_inputs: Mapping[str, str], *names: str) -> dict[str, Any]:
    """What a node says that all matmuls have, and its inputs after the weights, by name.

    first: index of the weights among the inputs. optional_inputs: name of each, by the field that says if it is there.
    names: of further fields.
    """
    fields: dict[str, Any] = {**read_fields(node)}
    num_weights = 1 + (node.op_type in WITH_SCALES) + fields["has_zero_points"]
    rest = iter([operand(node, i) for i in range(first + num_weights, len(node.inputs))])
    return {
        "op_type": node.op_type,
        "x": operand(node, 0),
        "weights": tuple(operand(node, i) for i in range(first, first + num_weights)),
        "is_layer_norm": fields["norm"] == LAYER_NORM,
        "is_gated": bool(fields["gated"]),
        **{name: fields[name] for name in (*AS_FIELDS, *names)},
        **{name: next(rest) if fields[field] else None for field, name in optional_inputs.items()},
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(CpuMatmul):
    """``y = output_norm(activation(norm(x) . W^T + bias) * multiplier) + residual``; gates and ups in their gated form.

    norm_bias: [K] of a layer norm, or None. output_norm_weight: [N] of an RMS norm of each row of the result.
    """

    norm_bias: ir.Value | None = None
    output_norm_weight: ir.Value | None = None
    output_norm_epsilon: float = 0.0

    @classmethod
    def made(cls, graph: ir.Graph, x: ir.Value, matrix: PackedMatrix, bias: ir.Value | None = None) -> Linear:
        """A matmul by a matrix, which becomes constants of the graph. matrix: not gated."""
        return cls(x=x, bias=bias, **_made(graph, BITS_OF_LINEARS, matrix))

    @classmethod
    def of(cls, node: ir.Node) -> Linear:
        """What a node says."""
        return cls(**_read(node, 1, _FUSED, "output_norm_epsilon"))

    @property
    def is_bare(self) -> bool:
        """Whether nothing follows the matmul but a bias."""
        is_scaled = self.multiplier != 1.0 or self.output_norm_weight is not None
        return self.activation == "none" and self.residual is None and not is_scaled

    def write(self, b: Builder) -> ir.Value:
        """Add the node."""
        fused = (self.norm_weight, self.norm_bias, self.bias, self.output_norm_weight, self.residual)
        return _op(
            b,
            self.op_type,
            [self.x, *self.weights, *(value for value in fused if value is not None)],
            (*known_shape(self.x)[:-1], self.out_features),
            **self._fields(),
            has_norm_bias=int(self.norm_bias is not None),
            output_norm=int(self.output_norm_weight is not None),
            output_norm_epsilon=float(self.output_norm_epsilon),
        )


def is_linear(node: ir.Node | None) -> bool:
    """Whether a node is a linear of the CPU library."""
    return node is not None and is_cpu_node(node) and node.op_type in BITS_OF_LINEARS


def find_linears(graph: ir.Graph) -> Iterator[tuple[ir.Node, Linear]]:
    """Every linear of the CPU library. The node that is handed out may be replaced."""
    for node in list(graph):
        if node.graph is not None and is_linear(node):
            yield node, Linear.of(node)


def write_rows(b: Builder, ids: ir.Value, matrix: PackedMatrix) -> ir.Value:
    """Add a node that gives rows of a table, which may be a linear's weights too."""
    weights = matrix.values(b.graph)
    return _op(
        b,
        _of_bits(BITS_OF_ROWS, matrix),
        [ids, *weights],
        (*known_shape(ids), matrix.num_inputs),
        num_rows=matrix.num_outputs,
        row_length=matrix.num_inputs,
        **_weight_fields(weights, _block_size(matrix)),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertLinear(CpuMatmul):
    """Each row of x by matrices that are chosen: ``activation(norm(x) . W^T + bias) * multiplier``, gates and ups in
    their form.

    x: [R, K] with any leading axes. picks: int64 [P], R a divisor of P, likewise. bias: [E, N], gated [E, 2N].
    pick_weights: [.., top_k], P in all: the result is the weighted sums of top_k rows each then, [.., N].
    residual: of as many elements as the result, which has its shape; added last.
    """

    picks: ir.Value
    num_experts: int
    pick_weights: ir.Value | None = None

    @classmethod
    def made(cls, graph: ir.Graph, x: ir.Value, picks: ir.Value, matrix: PackedMatrix) -> ExpertLinear:
        """A matmul by matrices, which become constants of the graph. matrix: not gated."""
        made = _made(graph, BITS_OF_EXPERTS, matrix)
        return cls(x=x, picks=picks, num_experts=matrix.num_experts, **made)

    @classmethod
    def of(cls, node: ir.Node) -> ExpertLinear:
        """What a node says."""
        return cls(picks=operand(node, 1), **_read(node, 2, _FUSED_OF_EXPERTS, "num_experts"))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        if self.residual is not None:
            return known_shape(self.residual)
        leading = known_shape(self.picks) if self.pick_weights is None else known_shape(self.pick_weights)[:-1]
        return (*leading, self.out_features)

    def write(self, b: Builder) -> ir.Value:
        """Add the node."""
        fused = (self.norm_weight, self.bias, self.pick_weights, self.residual)
        return _op(
            b,
            self.op_type,
            [self.x, self.picks, *self.weights, *(value for value in fused if value is not None)],
            self.shape,
            **self._fields(),
            num_experts=self.num_experts,
            has_pick_weights=int(self.pick_weights is not None),
        )


def is_expert_linear(node: ir.Node | None) -> bool:
    """Whether a node is a matmul by chosen matrices of the CPU library."""
    return node is not None and is_cpu_node(node) and node.op_type in BITS_OF_EXPERTS


def find_expert_linears(graph: ir.Graph) -> Iterator[tuple[ir.Node, ExpertLinear]]:
    """Every matmul by chosen matrices. The node that is handed out may be replaced."""
    for node in list(graph):
        if node.graph is not None and is_expert_linear(node):
            yield node, ExpertLinear.of(node)


def _row_order(matrix: PackedMatrix | None) -> dict[str, str]:
    return {} if matrix is None or matrix.order is None else {ROW_ORDER: shown_order(matrix.order)}


def _op(
    b: Builder, op_type: str, inputs: Sequence[ir.Value], shape: Sequence[int], **fields: int | float | str
) -> ir.Value:
    b.graph.opset_imports[DOMAIN] = VERSION
    return b.op(op_type, inputs, shape, ir.DataType.FLOAT, domain=DOMAIN, **fields)


def _weight_fields(weights: Sequence[ir.Value], block_size: int) -> dict[str, int | str]:
    """Fields that say how weights are stored."""
    scale_type = weights[1].dtype if len(weights) > 1 else None
    return {
        "block_size": block_size,
        "has_zero_points": int(len(weights) > 2),
        "scale_type": 0 if scale_type is None else SCALE_TYPES.index(scale_type),
        "layout": LAYOUT,
    }


def _made(graph: ir.Graph, names: Mapping[str, int], matrix: PackedMatrix) -> dict[str, Any]:
    """What a new matmul says of its matrix. names: of operators, by their bits."""
    return {
        "op_type": _of_bits(names, matrix),
        "weights": tuple(matrix.values(graph)),
        "in_features": matrix.num_inputs,
        "out_features": matrix.num_outputs,
        "block_size": _block_size(matrix),
    }


def _of_bits(names: Mapping[str, int], matrix: PackedMatrix) -> str:
    return next(name for name, has in names.items() if has == matrix.bits)


def _block_size(matrix: PackedMatrix) -> int:
    return 0 if matrix.integers is None else matrix.integers.block_size
