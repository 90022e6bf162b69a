"""Trace one run of a model that streams, with the model's own rotation folded away."""

from __future__ import annotations

import torch
from sinkrt.errors import UsageError, problem

from sinkexport.families.rope import identity_rotary, replaced_rotary
from sinkexport.model.decoder import StreamStep
from sinkexport.model.fold_constants import fold_constants
from sinkexport.model.fold_rotation import fold_rotation, functional
from sinkexport.model.latent import latent_parts


def trace(stream: StreamStep) -> torch.export.ExportedProgram:
    """Trace one run, with the model's own rotation folded away. Parameters are not copied.

    Raises: UsageError if the model reads positions anywhere but in its rotary embedding.
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
        latent_parts(stream.model, stream.latents),
    ):
        program = torch.export.export(stream, (ids, position, states, *num_valid), strict=False)
    program = functional(program)
    fold_rotation(program)
    fold_constants(program)
    _refuse_other_uses_of_position(program)
    return program


def _refuse_other_uses_of_position(program: torch.export.ExportedProgram) -> None:
    """Learned positions, ALiBi or length-dependent scaling read the position ids that the model is handed."""
    _, position, *_ = program.graph_signature.user_inputs
    ours = (torch.ops.sinkexport.stream_angles.default, torch.ops.sinkexport.sink_attention.default)
    node = next(n for n in program.graph_module.graph.nodes if n.name == position)
    strangers = [user for user in node.users if user.target not in ours and not _asks_for_the_beginning(user)]
    if strangers:
        raise UsageError(
            problem(
                "positions",
                received=f"a use outside the rotary embedding ({strangers[0].target})",
                expected="rotary or ALiBi positions only",
                fix="this model cannot be exported exactly",
            )
        )


def _asks_for_the_beginning(node: torch.fx.Node) -> bool:
    """Whether a node asks which streams begin, as `Tokens.begins` does."""
    return node.target == torch.ops.aten.eq.Scalar and node.args[1] == 0
