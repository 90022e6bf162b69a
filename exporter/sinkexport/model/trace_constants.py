"""Values of a trace that depend on constants alone: parameters, buffers and tensors of the code."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node, map_arg

MAX_NUMBERS = 1 << 20
"""Numbers of parameters and results that are computed here: no matrix of a large model is."""

NOTHING: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True, eq=False)
class TraceConstant:
    """Value of a node. parameters, computed: names of what it is made of.

    parameters: with the buffers that a file has. computed: buffers that no file has (they are not persistent), since
    the model's code makes them of its configuration.
    """

    value: torch.Tensor
    parameters: frozenset[str] = NOTHING
    computed: frozenset[str] = NOTHING


def trace_constants(program: torch.export.ExportedProgram) -> dict[Node, TraceConstant]:
    """Compute every value that depends on no input of the trace, in the order of its nodes.

    Large parameters, large results and what is made of them are left out.
    """
    known = dict(_leaves(program))
    for node in program.graph_module.graph.nodes:
        inputs = node.all_input_nodes
        if node.op != "call_function" or not all(one in known for one in inputs):
            continue
        value = _result(node, known)
        if isinstance(value, torch.Tensor) and value.numel() <= MAX_NUMBERS:
            made_of = [known[one] for one in inputs]
            parameters = NOTHING.union(*(one.parameters for one in made_of))
            known[node] = TraceConstant(value, parameters, NOTHING.union(*(one.computed for one in made_of)))
    return known


def _leaves(program: torch.export.ExportedProgram) -> Iterator[tuple[Node, TraceConstant]]:
    """Placeholders of a trace that are no inputs of it, with their tensors."""
    signature = program.graph_signature
    # Each of these looks through all inputs.
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    of_code, not_in_files = signature.inputs_to_lifted_tensor_constants, set(signature.non_persistent_buffers)
    for node in program.graph_module.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in of_code:
            yield node, TraceConstant(program.constants[of_code[node.name]])
        if (name := names.get(node.name)) is None:
            continue
        if name in not_in_files:
            yield node, TraceConstant(program.constants[name], computed=frozenset({name}))
        elif program.state_dict[name].numel() <= MAX_NUMBERS:
            yield node, TraceConstant(program.state_dict[name].detach(), parameters=frozenset({name}))


def _result(node: Node, known: dict[Node, TraceConstant]) -> Any:
    """Result of a node whose inputs are all known."""
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda one: known[one].value)
    with torch.no_grad():
        return node.target(*args, **kwargs)
