"""Compressed convolutional attention (Zaya, arXiv:2510.04476): states of the projection that softmax attention follows.

Queries and keys are mixed by two short convolutions, and half of each value is that of the token before.
"""

from __future__ import annotations

from typing import Any

import torch

from sinkexport.recurrent.modules import ModuleRule, TokenStates
from sinkexport.recurrent.states import StateKey

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _shapes(module: Any) -> dict[StateKey, tuple[int, ...]]:
    channels, num_kept = module.conv_qk_depthwise.in_channels, module.conv_kernel_size
    return {("conv", 0): (channels, num_kept), ("recurrent", 0): (module.v_proj_delayed.out_features,)}


def _forward(module: Any, states: TokenStates, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Heads:
    """hidden_states [B, T, N] -> query, key and value, [B, T, H, D] each."""
    batch, num_tokens, _width = hidden_states.shape
    shape = (batch, num_tokens, -1, module.head_dim)
    queries, keys = module.q_proj(hidden_states), module.k_proj(hidden_states)
    groups = module.num_key_value_groups
    q_residual = (queries.view(shape) + keys.view(shape).repeat_interleave(groups, dim=2)) * 0.5
    k_residual = q_residual.view(batch, num_tokens, -1, groups, module.head_dim).mean(dim=-2)
    seen = states.window(torch.cat([queries, keys], dim=-1).transpose(1, 2))  # [B, C, K + T]
    mixed = module.conv_qk_grouped(module.conv_qk_depthwise(seen)).transpose(1, 2)
    query, key = mixed.split([queries.shape[-1], keys.shape[-1]], dim=-1)
    value = torch.cat([module.v_proj_current(hidden_states), _delayed(module, states, hidden_states)], dim=-1)
    return query.view(shape) + q_residual, key.view(shape) + k_residual, value.view(shape)


def _delayed(module: Any, states: TokenStates, hidden_states: torch.Tensor) -> torch.Tensor:
    """The half of the values that comes from the token before each: [B, T, N]."""
    own = module.v_proj_delayed(hidden_states)
    before = states.states["recurrent", 0]
    seen = torch.cat([before[:, None], own.to(before.dtype)], dim=1)  # [B, 1 + T, N]
    if states.num_valid is not None:
        after = seen.index_select(1, states.num_valid)[:, 0]
    else:
        after = torch.where(states.is_token[:, -1:], seen[:, -1], seen[:, -2])
    states.states["recurrent", 0] = after
    delayed = seen[:, :-1].to(own.dtype)
    if module.v_proj_delayed.bias is not None:  # what a stream's first token sees: the projection of zeros
        delayed = torch.where(states.begins[..., None], module.v_proj_delayed.bias, delayed)
    return delayed


RULES = (ModuleRule("ZayaCCAProjection", _shapes, _forward),)
