"""Matmuls of the TensorRT plugin as values: read from a graph, changed, and written again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape, operand
from sinkexport.graph.gates import GELU, GELU_TANH, SILU
from sinkexport.graph.operators import DOMAIN, HALF_LINEAR, INT4_LINEAR, INT8_LINEAR
from sinkexport.graph.plugin_nodes import PLUGIN_ATTRIBUTES, is_plugin

ACTIVATIONS = (SILU, GELU, GELU_TANH)
"""Activations by their numbers in fields of nodes."""

NO_NORM, HALF_NORM, FLOAT_NORM = 0, 1, 2
"""Values of the field ``norm``: without one, with a weight of float16 or of float32."""

NUM_WEIGHTS = {HALF_LINEAR: 1, INT8_LINEAR: 2, INT4_LINEAR: 2}
"""Inputs that are weights or scales; zero points of INT4 weights are one more."""

GATE_MULTIPLE = 16
"""Outputs of a gate that one tile of a kernel has: plugins/kernels/linear.h."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PluginLinear:
    """``y = norm(x) . W^T + bias + residual``, or with a gate ``activation(gate) * up`` of the rows gate | up.

    num_outputs: N, rows of W. int4_fields: of INT4 weights, else none. norm_weight: [K]. gate: number of the
    activation, or None.
    """

    op_type: str
    x: ir.Value
    weights: tuple[ir.Value, ...]
    num_outputs: int
    int4_fields: tuple[tuple[str, int], ...] = ()
    norm_weight: ir.Value | None = None
    norm_epsilon: float = 0.0
    bias: ir.Value | None = None
    residual: ir.Value | None = None
    gate: int | None = None

    @classmethod
    def of(cls, node: ir.Node) -> PluginLinear:
        """What a node says."""
        fields = {name: attribute.value for name, attribute in node.attributes.items()}
        num_weights = NUM_WEIGHTS[node.op_type] + fields.get("has_zero_points", 0)
        rest = iter(operand(node, i) for i in range(1 + num_weights, len(node.inputs)))
        return cls(
            op_type=node.op_type,
            x=operand(node, 0),
            weights=tuple(operand(node, i) for i in range(1, 1 + num_weights)),
            num_outputs=fields["num_outputs"],
            int4_fields=tuple((name, fields[name]) for name in ("block_size", "has_zero_points") if name in fields),
            norm_weight=next(rest) if fields["norm"] else None,
            norm_epsilon=fields["norm_epsilon"],
            bias=next(rest) if fields["has_bias"] else None,
            residual=next(rest) if fields["has_residual"] else None,
            gate=fields["gate"] - 1 if fields["gate"] else None,
        )

    @property
    def is_bare(self) -> bool:
        """Whether nothing follows the matmul but a bias."""
        return self.residual is None and self.gate is None

    def write(self, b: Builder) -> ir.Value:
        """Add the node. x and the result are float16."""
        norm = NO_NORM
        if self.norm_weight is not None:
            norm = FLOAT_NORM if self.norm_weight.dtype == ir.DataType.FLOAT else HALF_NORM
        more = (self.norm_weight, self.bias, self.residual)
        return b.op(
            self.op_type,
            [self.x, *self.weights, *(value for value in more if value is not None)],
            (*known_shape(self.x)[:-1], self.num_outputs if self.gate is None else self.num_outputs // 2),
            ir.DataType.FLOAT16,
            domain=DOMAIN,
            num_outputs=self.num_outputs,
            has_bias=int(self.bias is not None),
            norm=norm,
            norm_epsilon=float(self.norm_epsilon),
            has_residual=int(self.residual is not None),
            gate=0 if self.gate is None else self.gate + 1,
            **dict(self.int4_fields),
            **PLUGIN_ATTRIBUTES,
        )


def is_plugin_linear(node: ir.Node | None) -> bool:
    """Whether a node is a matmul by one matrix of the TensorRT plugin: the CPU library has some of the same name."""
    return node is not None and node.domain == DOMAIN and node.op_type in NUM_WEIGHTS and is_plugin(node)


def find_plugin_linears(graph: ir.Graph) -> Iterator[tuple[ir.Node, PluginLinear]]:
    """Every such matmul. The node that is handed out may be replaced."""
    for node in list(graph):
        if node.graph is not None and is_plugin_linear(node):
            yield node, PluginLinear.of(node)
