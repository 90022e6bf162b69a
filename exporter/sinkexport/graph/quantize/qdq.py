"""Quantised matmuls as explicit QuantizeLinear and DequantizeLinear nodes, which TensorRT turns into INT8 kernels.

TensorRT wants symmetric scales that are constants of the graph. So weights of 4 bits with zero points and scales found
at run time cannot be expressed; recipes that need them do not list this target. Other runtimes compute the same numbers
from these nodes, if not as fast.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from sinkrt.errors import UsageError, problem

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import constant, known_shape, replace_node
from sinkexport.graph.matmuls import Matmul
from sinkexport.graph.quantize.form import FormParts
from sinkexport.graph.quantize.plan import InputScale
from sinkexport.quant.weight import QuantizedWeight


class QdqForm(FormParts):
    """Writes one graph. scale_dtype: of scales, and of what is computed with them; None: the matmul's."""

    scale_dtype: ir.DataType | None = None

    def weight_only(self, matmul: Matmul, weight: QuantizedWeight) -> None:
        """x @ DQ(W)."""
        b = Builder(self.graph)
        replace_node(matmul.node, b.nodes, [self._matmul(b, matmul, matmul.x, weight)])

    def dynamic(self, matmul: Matmul, weight: QuantizedWeight) -> None:  # noqa: ARG002 - as all forms
        """Raises: UsageError, always."""
        raise UsageError(
            problem(
                f"weights '{weight.name}'",
                received="inputs quantised at run time",
                expected="what TensorRT can express: ranges known when the engine is built",
                fix="use a recipe with activations.mode float or static",
            )
        )

    def static(self, matmul: Matmul, weight: QuantizedWeight, scale: InputScale) -> None:
        """DQ(Q(x)) @ DQ(W); sinks are made to fit the others' range and the matmul larger again."""
        b, x = Builder(self.graph), matmul.x
        dtype, shape = self.scale_dtype or matmul.dtype, known_shape(x)
        x = b.cast(x, dtype)
        apart = scale.sinks is not None and self.num_sinks > 0
        before, after = self.sink_factors(b, matmul, scale) if apart else (None, None)
        if before is not None:
            x = b.op("Mul", [x, b.cast(before, dtype)])
        step = b.scalar(scale.rest, dtype)
        zero = constant(self.graph, np.asarray(0, np.int8), "zero_point")
        quantized = b.op("QuantizeLinear", [x, step, zero], shape, ir.DataType.INT8)
        out = self._matmul(b, matmul, b.op("DequantizeLinear", [quantized, step, zero], shape, dtype), weight)
        if after is not None:
            out = b.op("Mul", [out, b.cast(after, dtype)])
        replace_node(matmul.node, b.nodes, [b.cast(out, matmul.dtype)])

    def gather(self, node: ir.Node, weight: QuantizedWeight) -> None:
        """Rows of DQ(table)."""
        b, ids, result = Builder(self.graph), node.inputs[1], node.outputs[0]
        if ids is None:
            raise ValueError(f"Gather '{node.name}' without indices")
        rows = b.op("Gather", [self._rows(b, weight), ids], known_shape(result), result.dtype, axis=0)
        replace_node(node, b.nodes, [rows])

    def _matmul(self, b: Builder, matmul: Matmul, x: ir.Value, weight: QuantizedWeight) -> ir.Value:
        shape = known_shape(matmul.node.outputs[0])
        if matmul.is_table:
            return b.op("Gemm", [x, self._rows(b, weight)], shape, x.dtype, transB=1)
        matrix = self.lazy(
            weight,
            "int8",
            ir.DataType.INT8,
            (weight.num_inputs, weight.num_outputs),
            lambda: np.ascontiguousarray(weight.integers().T),
        )
        return b.matmul(x, self._dequantized(b, weight, matrix, axis=1))

    def _rows(self, b: Builder, weight: QuantizedWeight) -> ir.Value:
        """[N, K] in floating point."""
        rows = self.lazy(weight, "int8", ir.DataType.INT8, (weight.num_outputs, weight.num_inputs), weight.integers)
        return self._dequantized(b, weight, rows, axis=0)

    def _dequantized(self, b: Builder, weight: QuantizedWeight, integers: ir.Value, axis: int) -> ir.Value:
        scheme = weight.scheme
        if scheme.bits != 8 or scheme.block_size is not None or not scheme.symmetric:
            raise UsageError(
                problem(
                    f"weights '{weight.name}'",
                    received=f"{scheme.bits} bits in blocks",
                    expected="what this target expresses: 8 bits, a scale for each channel",
                    fix="use --target onnx or another recipe",
                )
            )
        dtype = self.scale_dtype or (ir.DataType.FLOAT16 if scheme.scale_dtype == "float16" else ir.DataType.FLOAT)
        scales = self.lazy(
            weight, "scales", dtype, (weight.num_outputs,), lambda: weight.scales()[:, 0].astype(dtype.numpy())
        )
        # TensorRT 8.5 wants zero points said.
        zeros = constant(self.graph, np.zeros(weight.num_outputs, np.int8), "zero_points")
        return b.op("DequantizeLinear", [integers, scales, zeros], known_shape(integers), dtype, axis=axis)
