"""Trace one run of a model that streams, with the model's own rotation folded away."""

from __future__ import annotations

import torch
from sinkrt.errors import UsageError, problem
from torch.fx import Node

from sinkexport.families.rope import identity_rotary, replaced_rotary
from sinkexport.families.weights_after import without_weights
from sinkexport.model.decoder import StreamStep
from sinkexport.model.fold_constants import fold_constants
from sinkexport.model.fold_rotation import fold_rotation, functional
from sinkexport.model.latent import latent_parts


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
        latent_parts(stream.model, stream.latents),
    ):
        program = torch.export.export(stream, (ids, position, states, *num_valid), strict=False)
    program = functional(program)
    fold_rotation(program)
    fold_constants(program)
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
    readers = [user for user in start.users if user.target not in ours and not _asks_for_the_beginning(user)]
    of_position = {user: user for user in readers}  # what depends on positions, and what first read them
    for node in nodes:
        sources = [one for one in node.all_input_nodes if one in of_position]
        if node.op != "output" and node.target not in ours:
            if sources:
                of_position.setdefault(node, of_position[sources[0]])
        elif sources and (node.op == "output" or _inputs_but_query(node) & of_position.keys()):
            raise UsageError(
                problem(
                    "positions",
                    received=f"a use outside the rotary embedding ({of_position[sources[0]].target})",
                    expected="rotary or ALiBi positions, or a scale of queries",
                    fix="this model cannot be exported exactly",
                )
            )


def _inputs_but_query(node: Node) -> set[Node]:
    """Inputs of one of the operators, an attention's queries left out."""
    given = dict(node.kwargs)
    arguments = list(node.args)
    if node.target is torch.ops.sinkexport.sink_attention.default:
        given.pop("q", None)
        arguments = arguments[1:]
    return {one for one in (*arguments, *given.values()) if isinstance(one, Node)}


def _asks_for_the_beginning(node: torch.fx.Node) -> bool:
    """Whether a node asks which streams begin, as `Tokens.begins` does."""
    return node.target == torch.ops.aten.eq.Scalar and node.args[1] == 0
