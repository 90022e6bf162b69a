"""Lightning attention (MiniMax-Text-01, arXiv:2501.08313): linear attention that decays by a constant of each head."""

from __future__ import annotations

import torch

from sinkexport.model.recurrent import DecayMasks


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
    out = since_start * (query @ state) + ((query @ key.mT) * since) @ value
    after = since_start[:, :, -1:] * state + (key * since[:, :, -1:].mT).mT @ value
    return out.to(dtype), after
