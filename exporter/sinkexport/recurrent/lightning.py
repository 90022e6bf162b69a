"""Lightning attention (MiniMax-Text-01, arXiv:2501.08313): linear attention that decays by a constant of each head."""

from __future__ import annotations

from typing import Any

import torch

from sinkexport.recurrent.delta_rule import DecayMasks
from sinkexport.recurrent.modules import ModuleRule, TokenStates
from sinkexport.recurrent.states import StateKey


def lightning_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor,
    masks: DecayMasks,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token decays the state by exp(log_decay), adds k v^T to it and reads q^T of it.

    query, key: [B, H, T, Dk]; value: [B, H, T, Dv]; log_decay: [B or 1, H, T], 0 for what is no token, whose key is 0.
    state: float32 [B, H, Dk, Dv]. Returns: [B, H, T, Dv] of the query's dtype, and the state after the last token.
    """
    dtype = query.dtype
    query, key, value, logs = query.float(), key.float(), value.float(), log_decay.float()[..., None]  # [B, H, T, .]
    if query.shape[2] == 1:
        state = logs.exp() * state + key.mT @ value
        return (query @ state).to(dtype), state
    since_start = torch.exp(masks.causal @ logs)  # [B, H, T, 1]
    # Sums of their own, since differences of long sums would lose digits: [B, H, T, T].
    since = torch.exp(masks.causal @ (logs * masks.later)) * masks.causal
    # One copy, so that the new state comes after all that read the old one: they share a buffer.
    seen, state = torch.cat([query @ state, state], dim=2).split([query.shape[2], state.shape[2]], dim=2)
    out = since_start * seen + ((query @ key.mT) * since) @ value
    after = since_start[:, :, -1:] * state + (key * since[:, :, -1:].mT).mT @ value
    return out.to(dtype), after


def _shapes(module: Any) -> dict[StateKey, tuple[int, ...]]:
    return {("recurrent", 0): (module.num_attention_heads, module.head_dim, module.head_dim)}


def _forward(module: Any, states: TokenStates, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
    """hidden_states: [B, T, N] -> the same."""
    batch, num_tokens, _width = hidden_states.shape
    mixed = module.act_fn(module.qkv_proj(hidden_states))
    mixed = mixed.reshape(batch, num_tokens, module.num_attention_heads, 3 * module.head_dim).transpose(1, 2)
    query, key, value = mixed.split(module.head_dim, dim=3)  # [B, H, T, D]
    counts = states.is_token[:, None]  # [B, 1, T]
    log_decay = torch.where(counts, -module.slope_rate[:, :, 0].float(), 0.0)  # [B, H, T]
    out, states.states["recurrent", 0] = lightning_attention(
        query,
        torch.where(counts[..., None], key, 0.0),
        value,
        log_decay,
        states.states["recurrent", 0],
        DecayMasks(num_tokens),
    )
    out = module.norm(out.transpose(1, 2).reshape(batch, num_tokens, -1))
    return module.out_proj(torch.sigmoid(module.output_gate(hidden_states)) * out), None


RULES = (ModuleRule("MiniMaxLightningAttention", _shapes, _forward),)
