"""Products by INT8 weights and INT8 tables as plugin nodes; INT8 inputs with static ranges as explicit Q/DQ."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from sinkrt.errors import UsageError, problem

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import known_shape, replace_node
from sinkexport.graph.operators import DOMAIN, INT8_LINEAR, INT8_ROWS
from sinkexport.graph.passes.plugin_operators import PLUGIN_ATTRIBUTES
from sinkexport.graph.passes.products import Product
from sinkexport.graph.passes.quantize_qdq import QdqForm
from sinkexport.graph.passes.quantized_weight import QuantizedWeight
from sinkexport.graph.passes.weights import bias_addition, weight_operand

BYTES_OF_WORD = 4
INPUTS_MULTIPLE = 16
"""The kernel reads 16 weights at once (plugins/kernels/linear.h)."""


class PluginForm(QdqForm):
    """Writes one graph. Weights lie in the file as int8 [N, K], declared as int32 [N, K/4], little-endian: every parser
    takes int32 constants, none gives them a meaning. Q/DQ is in float32: TensorRT 8.5 reads no other scales."""

    scale_dtype = ir.DataType.FLOAT

    def weight_only(self, product: Product, weight: QuantizedWeight) -> None:
        """Int8Linear(x, W, scale), sums in float32; inputs and outputs in float16. A bias of float16 that follows is
        added before the sum is rounded."""
        half = ir.DataType.FLOAT16
        b, result = Builder(self.graph), product.node.outputs[0]
        addition = bias_addition(result) if product.dtype == half else None
        bias = weight_operand(addition)
        inputs = [b.cast(product.x, half), self._packed(weight), self._scales(weight)]
        out = b.op(
            INT8_LINEAR, inputs if bias is None else [*inputs, bias], known_shape(result), half, domain=DOMAIN,
            num_outputs=weight.num_outputs, has_bias=int(bias is not None), **PLUGIN_ATTRIBUTES,
        )  # fmt: skip
        if addition is not None:
            replace_node(addition, [], [result])
        replace_node(product.node, b.nodes, [b.cast(out, product.dtype)])

    def gather(self, node: ir.Node, weight: QuantizedWeight) -> None:
        """Int8Rows(ids, table, scale), float16."""
        ids, result = node.inputs[1], node.outputs[0]
        if ids is None:
            raise ValueError(f"Gather '{node.name}' without indices")
        b = Builder(self.graph)
        rows = b.op(
            INT8_ROWS, [ids, self._packed(weight), self._scales(weight)], known_shape(result), ir.DataType.FLOAT16,
            domain=DOMAIN, row_length=weight.num_inputs, **PLUGIN_ATTRIBUTES,
        )  # fmt: skip
        replace_node(node, b.nodes, [b.cast(rows, result.dtype or ir.DataType.FLOAT)])

    def _packed(self, weight: QuantizedWeight) -> ir.Value:
        """int32 [N, K/4]: int8 [N, K]."""
        scheme = weight.scheme
        if scheme.bits != 8 or scheme.block_size is not None or not scheme.symmetric:
            raise self._refused(weight, f"{scheme.bits} bits in blocks", "8 bits, a scale for each channel")
        if weight.num_inputs % INPUTS_MULTIPLE:
            raise self._refused(weight, f"{weight.num_inputs} inputs", f"a multiple of {INPUTS_MULTIPLE}")
        shape = (weight.num_outputs, weight.num_inputs // BYTES_OF_WORD)
        return self.lazy(weight, "int8x4", ir.DataType.INT32, shape,
                         lambda: np.ascontiguousarray(weight.integers()).view("<i4"))  # fmt: skip

    def _scales(self, weight: QuantizedWeight) -> ir.Value:
        """float32 [N]."""
        return self.lazy(weight, "scales", ir.DataType.FLOAT, (weight.num_outputs,),
                         lambda: weight.scales()[:, 0].astype(np.float32))  # fmt: skip

    def _refused(self, weight: QuantizedWeight, received: str, expected: str) -> UsageError:
        return UsageError(problem(f"weights '{weight.name}'", received=received,
                                  expected=f"what the Int8Linear plugin takes: {expected}",
                                  fix="use another recipe, keep_float, or --native"))  # fmt: skip
