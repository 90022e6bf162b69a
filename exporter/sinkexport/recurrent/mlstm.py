"""The mLSTM of xLSTM (arXiv:2405.04517, 2503.13427): a matrix memory with exponential gates and a normaliser."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from sinkexport.recurrent.delta_rule import DecayMasks
from sinkexport.recurrent.modules import ModuleRule, TokenStates
from sinkexport.recurrent.scan import NOTHING
from sinkexport.recurrent.states import StateKey

States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Matrix [B, H, Dk, Dv], normaliser [B, H, Dk] and the gates' largest logarithm [B, H, 1]: float32, all 0 at first."""


def mlstm(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    input_gate: torch.Tensor,
    forget_gate: torch.Tensor,
    states: States,
    is_token: torch.Tensor,
    masks: DecayMasks,
    eps: float,
) -> tuple[torch.Tensor, States]:
    """T tokens at once, in float32: matrix and normaliser are kept divided by exp(m), m the third state.

    query, key: [B, H, T, Dk]; value: [B, H, T, Dv]; input_gate, forget_gate: [B, H, T], before their exponential and
    sigmoid. is_token: bool [B, T]; what is none leaves the states as they are. Returns: [B, H, T, Dv] of the query's
    dtype, and the states after the last token.
    """
    dtype, counts = query.dtype, is_token[:, None]  # [B, 1, T]
    query, key, value = query.float() * query.shape[-1] ** -0.5, key.float(), value.float()
    logs = torch.where(counts, torch.nn.functional.logsigmoid(forget_gate.float()), 0.0)[..., None]  # [B, H, T, 1]
    gates = torch.where(counts, input_gate.float(), NOTHING)[:, :, None]  # [B, H, 1, T]
    # One copy, so that the new states come after all that read the old ones: they share their buffers.
    both = torch.cat([states[0], states[1][..., None]], dim=-1)  # [B, H, Dk, Dv + 1]
    largest = states[2][..., None]  # [B, H, 1, 1]

    own = masks.causal @ (logs * masks.later) + gates  # [B, H, T, T], of token j in the state after token t
    own = torch.where(masks.causal > 0, own, NOTHING)
    before = masks.causal @ logs + largest  # [B, H, T, 1], of what was there
    new_largest = torch.maximum(before, own.amax(dim=-1, keepdim=True))
    own, before = torch.exp(own - new_largest), torch.exp(before - new_largest)

    attention = (query @ key.mT) * own
    seen, seen_normaliser = (query @ both).split([value.shape[-1], 1], dim=-1)
    numerator = before * seen + attention @ value
    denominator = before * seen_normaliser + attention.sum(dim=-1, keepdim=True)
    out = numerator / (torch.maximum(denominator.abs(), torch.exp(-new_largest)) + eps)

    kept, taken = before[:, :, -1:], (key * own[:, :, -1:].mT).mT  # [B, H, 1, 1], [B, H, Dk, T]
    after = kept * both + torch.cat([taken @ value, taken.sum(dim=-1, keepdim=True)], dim=-1)
    return out.to(dtype), (after[..., :-1], after[..., -1], new_largest[:, :, -1])


def _shapes(layer: Any) -> dict[StateKey, tuple[int, ...]]:
    heads = layer.config.num_heads
    key_dim, value_dim = layer.qk_dim // heads, layer.v_dim // heads
    return {
        ("recurrent", 0): (heads, key_dim, value_dim),
        ("recurrent", 1): (heads, key_dim),
        ("recurrent", 2): (heads, 1),
    }


def _forward(layer: Any, states: TokenStates, x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
    """x: [B, T, N] -> the same."""

    def recur(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, igate: torch.Tensor, fgate: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, None]:
        found, masks = states.states, DecayMasks(query.shape[2])
        before = (found["recurrent", 0], found["recurrent", 1], found["recurrent", 2])
        out, after = mlstm(query, key, value, igate, fgate, before, states.is_token, masks, layer.config.eps)
        found |= {("recurrent", index): state for index, state in enumerate(after)}
        return out, None

    with mock.patch.object(layer.mlstm_backend, "forward", recur):
        return type(layer).forward(layer, x)[0], None


RULES = (ModuleRule("xLSTMLayer", _shapes, _forward),)
