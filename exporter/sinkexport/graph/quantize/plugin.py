"""Matmuls by INT8 and INT4 weights and tables as plugin nodes; INT8 inputs with static ranges as explicit Q/DQ."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
from sinkrt.errors import UsageError, problem

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape, lazy_weight, replace_node
from sinkexport.graph.matmuls import Matmul, bias_addition, weight_operand
from sinkexport.graph.operators import DOMAIN, INT4_LINEAR, INT4_ROWS, INT8_LINEAR, INT8_ROWS
from sinkexport.graph.plugin_linears import PluginLinear
from sinkexport.graph.plugin_nodes import PLUGIN_ATTRIBUTES
from sinkexport.graph.quantize import int4_tiles
from sinkexport.graph.quantize.qdq import QdqForm
from sinkexport.quant.weight import QuantizedWeight

BYTES_OF_WORD = 4
INPUTS_MULTIPLE = 16
"""The kernel reads 16 weights at once (plugins/kernels/linear.h)."""


class PluginForm(QdqForm):
    """Writes one graph. Weights lie in the file as int8 [N, K], declared as int32 [N, K/4], little-endian, or as INT4
    tiles, declared as int32 too: every parser takes int32 constants, none gives them a meaning. Q/DQ is in float32:
    TensorRT 8.5 reads no other scales. INT8 weights have one scale an output here, whatever blocks a recipe gives to
    those beside INT4 ones: such weights are rounded to the nearest."""

    scale_dtype = ir.DataType.FLOAT

    def weight_only(self, matmul: Matmul, weight: QuantizedWeight) -> None:
        """Int8Linear(x, W, scale) or Int4Linear(x, W, scale, zero points), sums in float32; inputs and outputs in
        float16. A bias of float16 that follows is added before the sum is rounded."""
        half = ir.DataType.FLOAT16
        b, result = Builder(self.graph), matmul.node.outputs[0]
        addition = bias_addition(result) if matmul.dtype == half else None
        bias = weight_operand(addition)
        stored, fields = self._stored(weight)
        linear = PluginLinear(
            op_type=INT4_LINEAR if fields else INT8_LINEAR,
            x=b.cast(matmul.x, half),
            weights=tuple(stored),
            num_outputs=weight.num_outputs,
            int4_fields=tuple(fields.items()),
            bias=bias,
        )
        out = linear.write(b)
        if addition is not None:
            replace_node(addition, [], [result])
        replace_node(matmul.node, b.nodes, [b.cast(out, matmul.dtype)])

    def gather(self, node: ir.Node, weight: QuantizedWeight) -> None:
        """Int8Rows(ids, table, scale) or Int4Rows(ids, table, scale, zero points), float16."""
        ids, result = node.inputs[1], node.outputs[0]
        if ids is None:
            raise ValueError(f"Gather '{node.name}' without indices")
        b = Builder(self.graph)
        stored, fields = self._stored(weight)
        rows = b.op(
            INT4_ROWS if fields else INT8_ROWS,
            [ids, *stored],
            known_shape(result),
            ir.DataType.FLOAT16,
            domain=DOMAIN,
            row_length=weight.num_inputs,
            **({"num_rows": weight.num_outputs, **fields} if fields else {}),
            **PLUGIN_ATTRIBUTES,
        )
        replace_node(node, b.nodes, [b.cast(rows, result.dtype or ir.DataType.FLOAT)])

    def _stored(self, weight: QuantizedWeight) -> tuple[list[ir.Value], dict[str, int]]:
        """Constants, and fields that nodes of INT4 weights have."""
        outputs, scheme = (weight.num_outputs,), weight.scheme
        if scheme.bits == 4:
            return int4_constants(self.graph, weight, outputs)
        if scheme.block_size is not None and scheme.symmetric:
            per_output = dataclasses.replace(scheme, block_size=None)
            weight = dataclasses.replace(weight, scheme=per_output, rounded=None)
        return [packed_rows(self.graph, weight, outputs), row_scales(self.graph, weight, outputs)], {}


def int4_constants(
    graph: ir.Graph, weight: QuantizedWeight, outputs: tuple[int, ...]
) -> tuple[list[ir.Value], dict[str, int]]:
    """Constants of INT4 weights [(E,) N], and the fields of their node.

    Raises: UsageError if the kernels do not take such weights.
    """
    if weight.scheme.block_size not in int4_tiles.BLOCK_SIZES:
        sizes = ", ".join(map(str, int4_tiles.BLOCK_SIZES))
        received = "a scale for each channel" if weight.scheme.block_size is None else f"blocks of {weight.group_size}"
        raise _refused(weight, f"4 bits, {received}", f"blocks of {sizes} inputs", "Int4Linear")
    if weight.num_inputs % int4_tiles.INPUTS_MULTIPLE:
        expected = f"a multiple of {int4_tiles.INPUTS_MULTIPLE}"
        raise _refused(weight, f"{weight.num_inputs} inputs", expected, "Int4Linear")
    return int4_tiles.stored_int4(graph, weight, outputs), int4_tiles.int4_fields(weight)


def packed_rows(graph: ir.Graph, weight: QuantizedWeight, outputs: tuple[int, ...]) -> ir.Value:
    """int32 [*outputs, K/4]: int8 [N, K], N the product of `outputs`.

    Raises: UsageError if the kernels do not take such weights.
    """
    scheme = weight.scheme
    if scheme.bits != 8 or scheme.block_size is not None or not scheme.symmetric:
        raise _refused(weight, f"{scheme.bits} bits in blocks", "8 bits, a scale for each channel", "Int8Linear")
    if weight.num_inputs % INPUTS_MULTIPLE:
        raise _refused(weight, f"{weight.num_inputs} inputs", f"a multiple of {INPUTS_MULTIPLE}", "Int8Linear")
    shape = (*outputs, weight.num_inputs // BYTES_OF_WORD)
    return lazy_weight(
        graph,
        f"{weight.name}.int8x4",
        ir.DataType.INT32,
        shape,
        lambda: np.ascontiguousarray(weight.integers()).view("<i4").reshape(shape),
    )


def row_scales(graph: ir.Graph, weight: QuantizedWeight, outputs: tuple[int, ...]) -> ir.Value:
    """float32 [*outputs]."""
    return lazy_weight(
        graph,
        f"{weight.name}.scales",
        ir.DataType.FLOAT,
        outputs,
        lambda: weight.scales().astype(np.float32).reshape(outputs),
    )


def _refused(weight: QuantizedWeight, received: str, expected: str, plugin: str) -> UsageError:
    return UsageError(
        problem(
            f"weights '{weight.name}'",
            received=received,
            expected=f"what the {plugin} plugin takes: {expected}",
            fix="use another recipe, keep_float, or --native",
        )
    )
