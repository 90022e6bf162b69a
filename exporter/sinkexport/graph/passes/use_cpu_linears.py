"""Matmuls by floating-point weights, and tables that they share, as nodes of the CPU library.

One layout serves steps and chunks, and no copy of the weights is made at run time.
"""

from __future__ import annotations

import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.cpu_nodes import Linear, write_rows
from sinkexport.graph.edit import is_weight, known_shape, operand, replace_node
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.matmuls import find_matmuls, find_tables
from sinkexport.graph.packed_weights import PackedMatrix, packed_floats

FLOAT = ir.DataType.FLOAT


class UseCpuLinears(GraphPass):
    """Hand over every matmul by a constant float32 matrix: FloatLinear(x, W), W packed in tiles of 16 outputs, or
    Bf16Linear where the plan rounds to bfloat16.

    A table that is also an embedding stays one tensor, whose rows FloatRows or Bf16Rows gives. Quantisation must have
    taken its matmuls.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each with one node."""
        graph, modified = model.graph, False
        tables = {node.inputs[0]: node for node in find_tables(graph)}
        for matmul in list(find_matmuls(graph)):
            if matmul.dtype != FLOAT or matmul.weight.dtype != FLOAT:
                continue
            name = "+".join(name for name, _ in matmul.rows)
            is_bfloat16 = self._is_bfloat16(matmul.modules[0])  # joined ones are of one kind
            matrix = packed_floats(name, matmul.transposed, is_bfloat16=is_bfloat16)
            gather = tables.get(matmul.weight) if matmul.is_table else None
            if gather is not None and not _replace_gather(graph, gather, matmul.weight, matrix):
                continue
            b, result = Builder(graph), matmul.node.outputs[0]
            out = Linear.made(graph, matmul.x, matrix).write(b)
            replace_node(matmul.node, b.nodes, [b.reshape(out, known_shape(result))])
            modified = True
        for node in list(graph):
            if (linear := _gemm(graph, node)) is not None:
                b = Builder(graph)
                replace_node(node, b.nodes, [linear.write(b)])
                modified = True
        return ir.passes.PassResult(model, modified)

    def _is_bfloat16(self, module: str) -> bool:
        return self.context.plan is not None and self.context.plan.is_bfloat16(module)


def _gemm(graph: ir.Graph, node: ir.Node) -> Linear | None:
    """The linear that does a Gemm of rows by a constant matrix [N, K] and a bias [N] (routers of experts)."""
    if node.op_type != "Gemm" or node.domain or len(node.inputs) != 3 or any(v is None for v in node.inputs):
        return None
    x, weight, bias = (operand(node, i) for i in range(3))
    fields = {name: attribute.value for name, attribute in node.attributes.items()}
    if (fields.get("transA", 0), fields.get("transB", 0), fields.get("alpha", 1.0), fields.get("beta", 1.0)) != (
        0,
        1,
        1,
        1,
    ):
        return None
    if not is_weight(weight) or not is_weight(bias) or len(list(weight.uses())) > 1 or weight.const_value is None:
        return None
    if any(value.dtype != FLOAT for value in (x, weight, bias)) or known_shape(bias) != known_shape(weight)[:1]:
        return None
    return Linear.made(graph, x, packed_floats(str(weight.name), weight.const_value), bias)


def _replace_gather(graph: ir.Graph, gather: ir.Node, table: ir.Value, matrix: PackedMatrix) -> bool:
    """Let an embedding read the packed table. Returns whether it can."""
    ids, result = gather.inputs[1], gather.outputs[0]
    axis = gather.attributes["axis"].as_int() if "axis" in gather.attributes else 0
    others = [use.node for use in table.uses() if use.node is not gather and use.node.op_type == "Gather"]
    if ids is None or ids.dtype != ir.DataType.INT64 or axis or others or table.const_value is None:
        return False
    b = Builder(graph)
    rows = write_rows(b, ids, matrix)
    replace_node(gather, b.nodes, [b.reshape(rows, known_shape(result))])
    return True
