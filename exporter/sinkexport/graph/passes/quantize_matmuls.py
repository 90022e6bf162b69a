"""Replace matmuls by constant matrices, and embeddings, with quantised ones, in the form that a target runs fast."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import constant, known_shape
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.matmuls import Matmul, find_matmuls, find_tables, module_of
from sinkexport.graph.quantize.forms import FORMS
from sinkexport.graph.quantize.plan import Form, Plan, treatment_of_rows
from sinkexport.quant.weight import QuantizedWeight


class QuantizeMatmuls(GraphPass):
    """Apply the plan to every matmul and every embedding. Without a plan nothing changes.

    An embedding that is tied to the output projection is stored once, as the projection is.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Quantise, in the target's form. The graph's second input is the position."""
        plan, graph, target = self.context.plan, model.graph, self.context.target
        if plan is None:
            return ir.passes.PassResult(model, False)
        form: Form = FORMS[target.quantization](graph, graph.inputs[1], self.context.num_sinks)
        decided = _quantize_matmuls(graph, plan, form)
        quantized = any(weight is not None for weight in decided.values())
        return ir.passes.PassResult(model, _quantize_tables(graph, plan, form, decided) or quantized)


def _quantize_matmuls(graph: ir.Graph, plan: Plan, form: Form) -> dict[ir.Value, QuantizedWeight | None]:
    """Returns what became of each matrix; None: it stays."""
    decided: dict[ir.Value, QuantizedWeight | None] = {}
    for matmul in list(find_matmuls(graph)):
        treatment = plan.treatment(matmul)
        if treatment is None:
            decided[matmul.weight] = None
            continue
        weight = QuantizedWeight(
            str(matmul.weight.name), matmul.transposed, treatment.scheme, transposed=True, rounded=treatment.rounded
        )
        decided[matmul.weight] = weight
        if treatment.order is not None:
            _reorder_inputs(graph, matmul, treatment.order)
        if treatment.dynamic:
            form.dynamic(matmul, weight)
        elif treatment.input_scale is not None:
            form.static(matmul, weight, treatment.input_scale)
        else:
            form.weight_only(matmul, weight)
    return decided


def _reorder_inputs(graph: ir.Graph, matmul: Matmul, order: npt.NDArray[np.int64]) -> None:
    """Let a matmul read channel order[i] of its input as channel i. Matmuls of one input and order share the Gather."""
    x, indices = matmul.x, constant(graph, order, "input_order")
    b = Builder(graph)
    for use in x.uses():
        if use.node.op_type == "Gather" and use.idx == 0 and use.node.inputs[1] is indices:
            reordered = use.node.outputs[0]
            break
    else:
        reordered = b.op("Gather", [x, indices], known_shape(x), x.dtype, axis=len(known_shape(x)) - 1)
        graph.insert_before(matmul.node, b.nodes)
    matmul.node.replace_input_with(0, reordered)


def _quantize_tables(graph: ir.Graph, plan: Plan, form: Form, decided: dict[ir.Value, QuantizedWeight | None]) -> bool:
    """Embeddings, those that are also a matmul's matrix as it was decided there. Returns whether there were any."""
    modified = False
    for node in list(find_tables(graph)):
        table = node.inputs[0]
        if table is None or table.const_value is None:
            continue
        if table in decided:
            stored = decided[table]
        else:
            name = str(table.name)
            treatment = treatment_of_rows(plan, module_of(name), table.const_value, "table")
            stored = None
            if treatment is not None:
                scheme, rounded = treatment.scheme, treatment.rounded
                stored = QuantizedWeight(name, table.const_value, scheme, transposed=True, rounded=rounded)
        if stored is not None:
            form.gather(node, stored)
            modified = True
    return modified
