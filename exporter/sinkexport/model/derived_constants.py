"""Constants that a model's code computes of its parameters alone, such as a decay rate or a mixing factor.

The converter folds them, so that the parameters themselves are nowhere in a graph. The check of its weights
(`sinkexport.loading.weights`) then looks for the results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from sinkexport.util.derived_constant import DerivedConstant

MAX_NUMBERS = 1 << 20
"""Numbers of parameters and results that are computed here: no matrix of a large model is."""

MODEL = "model."
"""Prefix of the names of a model's parameters: the model is a part of the traced step."""


def derived_constants(program: torch.export.ExportedProgram) -> list[DerivedConstant]:
    """Every value of a trace that depends on parameters alone and is read by what does not.

    Parameters themselves are left out, and what is made of a large one.
    """
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    known: dict[Node, tuple[Any, frozenset[str]]] = {}  # values, and the parameters that they are made of
    found = []
    for node in program.graph_module.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            tensor = program.state_dict.get(names[node.name])
            if isinstance(tensor, torch.Tensor) and tensor.numel() <= MAX_NUMBERS:
                known[node] = tensor.detach(), frozenset({names[node.name]})
            continue
        inputs = node.all_input_nodes
        if node.op != "call_function" or not all(one in known for one in inputs):
            continue
        arguments = torch.fx.node.map_arg((node.args, node.kwargs), lambda one: known[one][0])
        with torch.no_grad():
            values = node.target(*arguments[0], **arguments[1])
        if isinstance(values, torch.Tensor) and values.numel() <= MAX_NUMBERS:
            known[node] = values, frozenset().union(*(known[one][1] for one in inputs))
    for node, (values, sources) in known.items():
        is_read = any(user not in known for user in node.users)
        if node.op == "call_function" and sources and is_read and values.is_floating_point():
            tensors = {name.removeprefix(MODEL): program.state_dict[name].detach() for name in sorted(sources)}
            arrays = {name: tensor.float().numpy().copy() for name, tensor in tensors.items()}
            found.append(DerivedConstant(values.float().numpy().copy(), arrays))
    return found
