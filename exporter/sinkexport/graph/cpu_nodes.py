"""Nodes of the CPU library (plugins/cpu) as values: read from a graph, changed, and written again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

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
from sinkexport.graph.packed_weights import LAYOUT, ROW_ORDER, SCALE_TYPES, PackedMatrix, packed_source, shown_order

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

_FUSED = ("norm", "has_norm_bias", "has_bias", "output_norm", "has_residual")
"""Fields that say which inputs follow the weights, in their order."""


def is_cpu_node(node: ir.Node) -> bool:
    """Whether a node is in the form that the CPU library takes."""
    if node.domain != DOMAIN:
        return False
    if node.op_type == SINK_ATTENTION:
        return "bfloat16_chunks" in node.attributes
    return "layout" in node.attributes  # of the plugin's nodes some have the same names


def has_other_matmuls(graph: ir.Graph) -> bool:
    """Whether matmuls or recurrences are left to other operators, which compute rows of a chunk without a token too."""
    return any(node.op_type in OTHER_MATMULS for node in graph)


@dataclasses.dataclass(frozen=True)
class Linear:
    """``y = output_norm(activation(norm(x) . W^T + bias) * multiplier) + residual``; gates and ups in their gated form.

    weights: packed bytes, then scales and zero points if there are any. in_features, out_features: of x and y.
    norm_weight: [K] of an RMS norm of x, or of a layer norm with norm_bias [K] or None; None: no norm.
    output_norm_weight: [N] of an RMS norm of each row of the result.
    """

    op_type: str
    x: ir.Value
    weights: tuple[ir.Value, ...]
    in_features: int
    out_features: int
    block_size: int
    norm_weight: ir.Value | None = None
    norm_epsilon: float = 0.0
    norm_bias: ir.Value | None = None
    is_layer_norm: bool = False
    bias: ir.Value | None = None
    residual: ir.Value | None = None
    activation: str = "none"
    activation_limit: float = 0.0
    is_gated: bool = False
    multiplier: float = 1.0
    output_norm_weight: ir.Value | None = None
    output_norm_epsilon: float = 0.0

    @classmethod
    def made(cls, graph: ir.Graph, x: ir.Value, matrix: PackedMatrix, bias: ir.Value | None = None) -> Linear:
        """A matmul by a matrix, which becomes constants of the graph. matrix: not gated."""
        op_type = _of_bits(BITS_OF_LINEARS, matrix)
        weights = tuple(matrix.values(graph))
        return cls(op_type, x, weights, matrix.num_inputs, matrix.num_outputs, _block_size(matrix), bias=bias)

    @classmethod
    def of(cls, node: ir.Node) -> Linear:
        """What a node says."""
        fields = {name: attribute.value for name, attribute in node.attributes.items()}
        num_weights = 1 + (node.op_type in (INT8_LINEAR, INT4_LINEAR)) + fields["has_zero_points"]
        rest = iter([operand(node, i) for i in range(1 + num_weights, len(node.inputs))])
        norm_weight, norm_bias, bias, output_norm, residual = (next(rest) if fields[name] else None for name in _FUSED)
        return cls(
            op_type=node.op_type,
            x=operand(node, 0),
            weights=tuple(operand(node, i) for i in range(1, 1 + num_weights)),
            in_features=fields["in_features"],
            out_features=fields["out_features"],
            block_size=fields["block_size"],
            norm_weight=norm_weight,
            norm_epsilon=fields["norm_epsilon"],
            norm_bias=norm_bias,
            is_layer_norm=fields["norm"] == LAYER_NORM,
            bias=bias,
            residual=residual,
            activation=fields["activation"],
            activation_limit=fields["activation_limit"],
            is_gated=bool(fields["gated"]),
            multiplier=fields["multiplier"],
            output_norm_weight=output_norm,
            output_norm_epsilon=fields["output_norm_epsilon"],
        )

    @property
    def is_bare(self) -> bool:
        """Whether nothing follows the matmul but a bias."""
        is_scaled = self.multiplier != 1.0 or self.output_norm_weight is not None
        return self.activation == "none" and self.residual is None and not is_scaled

    @property
    def matrix(self) -> PackedMatrix | None:
        """What the weights are made of; None: in a graph that came from a file."""
        return packed_source(self.weights[0])

    def write(self, b: Builder) -> ir.Value:
        """Add the node."""
        fused = (self.norm_weight, self.norm_bias, self.bias, self.output_norm_weight, self.residual)
        norm = 0 if self.norm_weight is None else LAYER_NORM if self.is_layer_norm else RMS
        inputs = [self.x, *self.weights, *(value for value in fused if value is not None)]
        return _op(
            b,
            self.op_type,
            inputs,
            (*known_shape(self.x)[:-1], self.out_features),
            in_features=self.in_features,
            out_features=self.out_features,
            **_weight_fields(self.weights, self.block_size),
            norm=norm,
            norm_epsilon=float(self.norm_epsilon),
            has_norm_bias=int(self.norm_bias is not None),
            has_bias=int(self.bias is not None),
            has_residual=int(self.residual is not None),
            activation=self.activation,
            activation_limit=float(self.activation_limit),
            gated=int(self.is_gated),
            multiplier=float(self.multiplier),
            output_norm=int(self.output_norm_weight is not None),
            output_norm_epsilon=float(self.output_norm_epsilon),
            **ALL_TOKENS,
            **_row_order(self.matrix),
        )


def is_linear(node: ir.Node | None) -> bool:
    """Whether a node is a linear of the CPU library."""
    if node is None or node.domain != DOMAIN:
        return False
    return node.op_type in BITS_OF_LINEARS and "layout" in node.attributes


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


@dataclasses.dataclass(frozen=True)
class ExpertLinear:
    """Each row of x by matrices that are chosen: ``activation(norm(x) . W^T + bias) * multiplier``, gates and ups in
    their form.

    x: [R, K] with any leading axes. picks: int64 [P], R a divisor of P, likewise. weights: as `Linear`'s.
    norm_weight: [K] of an RMS norm, or of a layer norm. bias: [E, N], gated [E, 2N].
    pick_weights: [.., top_k], P in all: the result is the weighted sums of top_k rows each then, [.., N].
    residual: of as many elements as the result, which has its shape; added last.
    """

    op_type: str
    x: ir.Value
    picks: ir.Value
    weights: tuple[ir.Value, ...]
    in_features: int
    out_features: int
    num_experts: int
    block_size: int
    norm_weight: ir.Value | None = None
    norm_epsilon: float = 0.0
    is_layer_norm: bool = False
    bias: ir.Value | None = None
    activation: str = "none"
    activation_limit: float = 0.0
    is_gated: bool = False
    multiplier: float = 1.0
    pick_weights: ir.Value | None = None
    residual: ir.Value | None = None

    @classmethod
    def made(cls, graph: ir.Graph, x: ir.Value, picks: ir.Value, matrix: PackedMatrix) -> ExpertLinear:
        """A matmul by matrices, which become constants of the graph. matrix: not gated."""
        op_type, weights = _of_bits(BITS_OF_EXPERTS, matrix), tuple(matrix.values(graph))
        sizes = (matrix.num_inputs, matrix.num_outputs, matrix.num_experts)
        return cls(op_type, x, picks, weights, *sizes, _block_size(matrix))

    @classmethod
    def of(cls, node: ir.Node) -> ExpertLinear:
        """What a node says."""
        fields = {name: attribute.value for name, attribute in node.attributes.items()}
        num_weights = 1 + (node.op_type == INT8_EXPERT_LINEAR) + fields["has_zero_points"]
        rest = iter([operand(node, i) for i in range(2 + num_weights, len(node.inputs))])
        has = ("norm", "has_bias", "has_pick_weights", "has_residual")
        norm_weight, bias, pick_weights, residual = (next(rest) if fields[name] else None for name in has)
        return cls(
            op_type=node.op_type,
            x=operand(node, 0),
            picks=operand(node, 1),
            weights=tuple(operand(node, i) for i in range(2, 2 + num_weights)),
            in_features=fields["in_features"],
            out_features=fields["out_features"],
            num_experts=fields["num_experts"],
            block_size=fields["block_size"],
            norm_weight=norm_weight,
            norm_epsilon=fields["norm_epsilon"],
            is_layer_norm=fields["norm"] == LAYER_NORM,
            bias=bias,
            activation=fields["activation"],
            activation_limit=fields["activation_limit"],
            is_gated=bool(fields["gated"]),
            multiplier=fields["multiplier"],
            pick_weights=pick_weights,
            residual=residual,
        )

    @property
    def matrix(self) -> PackedMatrix | None:
        """What the weights are made of; None: in a graph that came from a file."""
        return packed_source(self.weights[0])

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
            in_features=self.in_features,
            out_features=self.out_features,
            num_experts=self.num_experts,
            **_weight_fields(self.weights, self.block_size),
            norm=0 if self.norm_weight is None else LAYER_NORM if self.is_layer_norm else RMS,
            norm_epsilon=float(self.norm_epsilon),
            has_bias=int(self.bias is not None),
            activation=self.activation,
            activation_limit=float(self.activation_limit),
            gated=int(self.is_gated),
            multiplier=float(self.multiplier),
            has_pick_weights=int(self.pick_weights is not None),
            has_residual=int(self.residual is not None),
            **ALL_TOKENS,
            **_row_order(self.matrix),
        )


def is_expert_linear(node: ir.Node | None) -> bool:
    """Whether a node is a matmul by chosen matrices of the CPU library."""
    if node is None or node.domain != DOMAIN:
        return False
    return node.op_type in BITS_OF_EXPERTS and "layout" in node.attributes


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


def _of_bits(names: Mapping[str, int], matrix: PackedMatrix) -> str:
    return next(name for name, has in names.items() if has == matrix.bits)


def _block_size(matrix: PackedMatrix) -> int:
    return 0 if matrix.integers is None else matrix.integers.block_size
