"""Replace matmuls by constant matrices, and embeddings, with quantised ones, in the form that a target runs fast."""

from __future__ import annotations

import onnx_ir as ir

from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.matmuls import find_matmuls, find_tables, module_of
from sinkexport.graph.quantize.forms import FORMS
from sinkexport.graph.quantize.plan import Form, Plan
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
        if treatment.dynamic:
            form.dynamic(matmul, weight)
        elif treatment.input_scale is not None:
            form.static(matmul, weight, treatment.input_scale)
        else:
            form.weight_only(matmul, weight)
    return decided


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
            scheme = plan.table(module_of(str(table.name)))
            name = str(table.name)
            stored = None if scheme is None else QuantizedWeight(name, table.const_value, scheme, transposed=True)
        if stored is not None:
            form.gather(node, stored)
            modified = True
    return modified
