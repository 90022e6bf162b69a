"""Compute in a trace what depends on constants alone and has no form in ONNX: the inverse of the error function.

Gemma 3n keeps the largest share of a layer's activations by the quantile of a normal distribution, which its code
computes anew from the share at every step (arXiv:2305.07185 has the idea).
"""

from __future__ import annotations

import torch

from sinkexport.model.trace_constants import trace_constants

aten = torch.ops.aten

_WITHOUT_FORM = (aten.erfinv.default,)


def fold_constants(program: torch.export.ExportedProgram) -> None:
    """Replace results of operators without a form in ONNX by their number, where they depend on constants alone.

    What depends on parameters stays: the check of weights would miss them.
    program: functional (model/fold_rotation.py), changed in place.
    """
    graph = program.graph_module.graph
    without_form = [node for node in graph.nodes if node.target in _WITHOUT_FORM]
    if not without_form:
        return
    known = trace_constants(program)
    for node in without_form:
        constant = known.get(node)
        if constant is None or constant.parameters or constant.value.numel() != 1:
            continue
        value = constant.value
        with graph.inserting_after(node):
            number = graph.call_function(
                aten.full.default, (list(value.shape), float(value)), {"dtype": value.dtype, "pin_memory": False}
            )
        number.meta = dict(node.meta)
        node.replace_all_uses_with(number)
        graph.erase_node(node)
    program.graph_module.recompile()
