"""Compute in a trace what depends on constants alone and has no form in ONNX: the inverse of the error function.

Gemma 3n keeps the largest share of a layer's activations by the quantile of a normal distribution, which its code
computes anew from the share at every step (arXiv:2305.07185 has the idea).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node, map_arg

aten = torch.ops.aten

_WITHOUT_FORM = (aten.erfinv.default,)


def fold_constants(program: torch.export.ExportedProgram) -> None:
    """Replace results of operators without a form in ONNX by their number, where they depend on constants alone.

    program: functional (model/fold_rotation.py), changed in place.
    """
    graph, known = program.graph_module.graph, _lifted(program)
    for node in list(graph.nodes):
        if node.target not in _WITHOUT_FORM or (value := _value(node, known)) is None or value.numel() != 1:
            continue
        with graph.inserting_after(node):
            number = graph.call_function(
                aten.full.default, (list(value.shape), float(value)), {"dtype": value.dtype, "pin_memory": False}
            )
        number.meta = dict(node.meta)
        node.replace_all_uses_with(number)
        graph.erase_node(node)
    program.graph_module.recompile()


def _lifted(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    """Placeholders that stand for constants of the code, by their names."""
    names = program.graph_signature.inputs_to_lifted_tensor_constants
    return {place: program.constants[name] for place, name in names.items()}


def _value(node: Node, known: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Value of a node that depends on constants alone; None: it does not."""
    values: dict[Node, Any] = {}

    def compute(one: Node) -> Any:
        if one not in values:
            if one.op == "placeholder":
                values[one] = known[one.name]
            else:
                args, others = map_arg((one.args, dict(one.kwargs)), compute)
                values[one] = one.target(*args, **others)
        return values[one]

    try:
        result = compute(node)
    except (KeyError, RecursionError, TypeError):  # an input of the step, or what is no plain operator
        return None
    return result if isinstance(result, torch.Tensor) else None
