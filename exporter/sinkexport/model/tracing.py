"""Trace one run of a model that streams, with the model's own rotation folded away."""

from __future__ import annotations

import torch
from sinkrt.errors import UsageError, problem
from torch.fx import Node

from sinkexport.families.rope import identity_rotary, replaced_rotary
from sinkexport.families.weights_after import without_weights
from sinkexport.model.decoder import StreamStep
from sinkexport.model.fold_rotation import fold_rotation, functional


def trace(stream: StreamStep) -> torch.export.ExportedProgram:
    """Trace one run, with the model's own rotation folded away. Parameters are not copied.

    Raises: UsageError if anything but queries depends on positions, rotation and ALiBi aside.
    """
    ids = torch.zeros(stream.batch, stream.num_tokens, dtype=torch.int64)
    position = torch.zeros(stream.batch, dtype=torch.int64)
    dtype = next(stream.model.parameters()).dtype
    states = [stream.empty_state(place, kind) for place, kind in stream.states]
    num_valid = () if stream.num_tokens == 1 else (torch.ones_like(position),)
    identity = identity_rotary(stream.rotary, stream.batch, stream.num_tokens, dtype)
    with (
        torch.no_grad(),
        replaced_rotary(stream.model, identity),
        without_weights(stream.model, stream.rotary.norms),
    ):
        program = torch.export.export(stream, (ids, position, states, *num_valid), strict=False)
    program = functional(program)
    fold_rotation(program)
    _refuse_other_uses_of_position(program)
    return program


def _refuse_other_uses_of_position(program: torch.export.ExportedProgram) -> None:
    """What reads the position ids that the model is handed may become queries, and nothing else.

    Learned positions, ALiBi or a scale of keys would reach an operator by another input, or the graph's outputs.
    """
    _, position, *_ = program.graph_signature.user_inputs
    operators = torch.ops.sinkexport
    ours = (operators.stream_angles.default, operators.sink_attention.default)
    nodes = program.graph_module.graph.nodes
    start = next(node for node in nodes if node.name == position)
    of_position = {user: user for user in start.users if user.target not in ours}  # each, and what first read them
    for node in nodes:
        sources = [one for one in node.all_input_nodes if one in of_position]
        if not sources:
            continue
        others = [one for one in node.all_input_nodes if one in of_position and one is not _query(node)]
        if node.op == "output" or (node.target in ours and (others or _is_also_other(node))):
            raise UsageError(
                problem(
                    "positions",
                    received=f"a use outside the rotary embedding ({of_position[sources[0]].target})",
                    expected="rotary or ALiBi positions, or a scale of queries",
                    fix="this model cannot be exported exactly",
                )
            )
        if node.target not in ours:
            of_position.setdefault(node, of_position[sources[0]])


def _query(node: Node) -> Node | None:
    """The queries that an attention operator is given; None: the node is none."""
    if node.target is not torch.ops.sinkexport.sink_attention.default:
        return None
    query = node.args[0] if node.args else node.kwargs["q"]
    return query if isinstance(query, Node) else None


def _is_also_other(node: Node) -> bool:
    """Whether an operator is given its queries as another input as well."""
    given = [*node.args, *node.kwargs.values()]
    return sum(one is _query(node) for one in given) > 1
