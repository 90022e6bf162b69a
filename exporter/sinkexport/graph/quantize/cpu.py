"""Matmuls by rounded weights, and rounded tables, as nodes of the CPU library.

Its kernels round each token's inputs to 8 bits, in groups of 32 to 128 channels, and sum exactly. So inputs of 8 bits
whose scale a recipe leaves to run time take the same form: the kernel's groups are finer. Inputs with ranges from
calibration, and schemes that it has no kernels for, stay ONNX Runtime's.
"""

from __future__ import annotations

import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.cpu_nodes import Linear, write_rows
from sinkexport.graph.edit import known_shape, replace_node
from sinkexport.graph.matmuls import Matmul
from sinkexport.graph.packed_weights import packed_integers
from sinkexport.graph.quantize.ort import OrtForm
from sinkexport.quant.weight import QuantizedWeight

FLOAT = ir.DataType.FLOAT


class CpuForm(OrtForm):
    """Writes one graph."""

    def weight_only(self, matmul: Matmul, weight: QuantizedWeight) -> None:
        """Int8Linear or Int4Linear. What surrounds it is fused by passes."""
        if not self._write(matmul, weight):
            super().weight_only(matmul, weight)

    def dynamic(self, matmul: Matmul, weight: QuantizedWeight) -> None:
        """The same node: its inputs are rounded at run time anyway."""
        if not self._write(matmul, weight):
            super().dynamic(matmul, weight)

    def gather(self, node: ir.Node, weight: QuantizedWeight) -> None:
        """Int8Rows or Int4Rows, of the bytes that an output projection may read too."""
        matrix, ids, result = packed_integers(weight), node.inputs[1], node.outputs[0]
        if matrix is None or ids is None or result.dtype != FLOAT or ids.dtype != ir.DataType.INT64:
            super().gather(node, weight)
            return
        b = Builder(self.graph)
        rows = b.reshape(write_rows(b, ids, matrix), known_shape(result))
        replace_node(node, b.nodes, [rows])

    def _write(self, matmul: Matmul, weight: QuantizedWeight) -> bool:
        """Whether there is a kernel for it."""
        matrix = packed_integers(weight)
        if matrix is None or matmul.dtype != FLOAT:
            return False
        b, result = Builder(self.graph), matmul.node.outputs[0]
        out = Linear.made(self.graph, matmul.x, matrix).write(b)
        replace_node(matmul.node, b.nodes, [b.reshape(out, known_shape(result))])
        return True
