"""Time mixing of RWKV-4 (arXiv:2305.13048): a weighted mean over all tokens, whose weights decay per channel."""

from __future__ import annotations

import torch

from sinkexport.model.recurrent_scan import NOTHING, Weighted, shifted, weighted_scan

States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Numerator, denominator and the logarithm by which both are scaled: float32 [B, N] each, all 0 at the beginning."""


def wkv(
    log_decay: torch.Tensor,
    bonus: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    states: States,
    is_token: torch.Tensor,
) -> tuple[torch.Tensor, States]:
    """Mean of each token's value and those before it, by weights exp(key), the own one times exp(bonus).

    log_decay: [N] < 0. bonus: [N]. key, value: [B, T, N]. is_token: bool [B, T]; what is none leaves the states as they
    are, to the bit. Returns: [B, T, N] of the value's dtype, and the states after the last token.
    """
    given, counts = states, is_token[..., None]
    key, values = key.float(), value.float()
    # Where nothing was summed the denominator is 0, and a state of zeros says so. A real one is at least 1.
    log_scale = torch.where(states[1] == 0.0, NOTHING, states[2])
    before = Weighted(*(x[:, None] for x in (log_scale, states[0], states[1])))
    tokens = Weighted(
        torch.where(counts, key, NOTHING), torch.where(counts, values, 0.0), counts.expand_as(key).to(torch.float32)
    )
    after = weighted_scan(torch.where(counts, log_decay.float(), 0.0), tokens, before)
    if key.shape[1] > 1:
        first = torch.arange(key.shape[1])[:, None] == 0
        before = Weighted(
            *(torch.where(first, x, shifted(y, 1, 0.0)) for x, y in zip(before, after, strict=True))
        )
    seen = Weighted(key + bonus.float(), values, torch.ones_like(values)).plus(before, 0.0)
    last = Weighted(*(x[:, -1] for x in after))
    new = (last.values, last.weights, last.log_scale)
    moved = is_token.any(dim=1)[:, None]
    kept = tuple(torch.where(moved, x, y) for x, y in zip(new, given, strict=True))
    return (seen.values / seen.weights).to(value.dtype), (kept[0], kept[1], kept[2])
