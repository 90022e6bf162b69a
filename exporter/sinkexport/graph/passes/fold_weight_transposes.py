"""Store weights in the orientation that MatMul reads. They stay lazy: turned while the weights file is written."""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import is_weight, known_shape, lazy_weight, replace_node
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.matmuls import ROWS


class FoldWeightTransposes(GraphPass):
    """``x @ Transpose(W)``: W is stored transposed, or read by Gemm(transB=1) if something else needs it as it is.

    The second case is an embedding that is tied to the output projection: it stays one tensor in the file.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace every Transpose of a constant matrix that only MatMuls read, as their right operand."""
        graph, modified = model.graph, False
        for node in list(graph):
            weight = node.inputs[0] if node.op_type == "Transpose" and not node.domain else None
            if weight is None or not is_weight(weight) or len(known_shape(weight)) != 2 or not _turns(node):
                continue
            users = [use.node for use in node.outputs[0].uses()]
            if any(user.domain or user.op_type != "MatMul" or user.inputs[1] is not node.outputs[0] for user in users):
                continue
            if len(weight.uses()) > 1:
                for user in users:
                    _use_gemm(graph, user, weight)
            else:
                _store_transposed(graph, node.outputs[0], weight)
            graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def _turns(node: ir.Node) -> bool:
    """Whether a Transpose of a matrix swaps its axes, for nodes of the graph alone."""
    perm = tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else (1, 0)
    return perm == (1, 0) and not node.outputs[0].is_graph_output()


def _store_transposed(graph: ir.Graph, result: ir.Value, weight: ir.Value) -> None:
    rows, columns = known_shape(weight)
    source = weight.const_value
    transposed = lazy_weight(
        graph,
        f"{weight.name}.T",
        weight.dtype,  # type: ignore[arg-type]
        (columns, rows),
        functools.partial(_transposed, source),
    )
    transposed.meta[ROWS] = ((str(weight.name), source),)
    ir.convenience.replace_all_uses_with(result, transposed)


def _transposed(tensor: ir.TensorProtocol | None) -> np.ndarray:
    if tensor is None:
        raise ValueError("a weight without content")
    return np.ascontiguousarray(tensor.numpy().T)


def _use_gemm(graph: ir.Graph, matmul: ir.Node, weight: ir.Value) -> None:
    """MatMul(x, W^T) with x [..., K] -> Gemm over x [rows, K] with transB."""
    x = matmul.inputs[0]
    if x is None:
        raise ValueError(f"MatMul '{matmul.name}' without an input")
    *others, depth = known_shape(x)
    rows, width = int(np.prod(known_shape(x))) // depth, known_shape(weight)[0]
    b = Builder(graph)
    out = b.op("Gemm", [b.reshape(x, (rows, depth)), weight], (rows, width), transB=1)
    replace_node(matmul, b.nodes, [b.reshape(out, (*others, width))])
