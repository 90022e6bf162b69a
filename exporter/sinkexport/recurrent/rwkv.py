"""Time mixing of RWKV-4 (arXiv:2305.13048): a weighted mean over all tokens, whose weights decay per channel."""

from __future__ import annotations

from typing import Any

import torch

from sinkexport.recurrent.modules import ModuleRule, TokenStates
from sinkexport.recurrent.scan import NOTHING, Weighted, shifted, weighted_scan
from sinkexport.recurrent.states import StateKey

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
    counts = is_token[..., None]
    key, values = key.float(), value.float()
    # One copy, so that the new states come after all that read the old ones: they share their buffers.
    numerator, denominator, scale = torch.stack(states).unbind()
    # Where nothing was summed the denominator is 0, and a state of zeros says so. A real one is at least 1.
    log_scale = torch.where(denominator == 0.0, NOTHING, scale)
    before = Weighted(*(x[:, None] for x in (log_scale, numerator, denominator)))
    tokens = Weighted(
        torch.where(counts, key, NOTHING), torch.where(counts, values, 0.0), counts.expand_as(key).to(torch.float32)
    )
    after = weighted_scan(torch.where(counts, log_decay.float(), 0.0), tokens, before)
    if key.shape[1] > 1:
        first = torch.arange(key.shape[1])[:, None] == 0
        before = Weighted(*(torch.where(first, x, shifted(y, 1, 0.0)) for x, y in zip(before, after, strict=True)))
    seen = Weighted(key + bonus.float(), values, torch.ones_like(values)).plus(before, 0.0)
    last = Weighted(*(x[:, -1] for x in after))
    new = (last.values, last.weights, last.log_scale)
    moved = is_token.any(dim=1)[:, None]
    kept = tuple(torch.where(moved, x, y) for x, y in zip(new, (numerator, denominator, scale), strict=True))
    return (seen.values / seen.weights).to(value.dtype), (kept[0], kept[1], kept[2])


def _mixed(module: Any, hidden: torch.Tensor, states: TokenStates, *names: str) -> list[torch.Tensor]:
    """hidden [B, T, N] mixed with that of the token before, by the shares of these names."""
    before = states.window(hidden.transpose(1, 2))[..., : hidden.shape[1]].transpose(1, 2)
    shares = [getattr(module, f"time_mix_{name}") for name in names]
    return [hidden * share + before * (1 - share) for share in shares]


def _attend(module: Any, states: TokenStates, hidden: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
    key, value, receptance = _mixed(module, hidden, states, "key", "value", "receptance")
    receptance = torch.sigmoid(module.receptance(receptance))
    found = states.states
    before = (found["recurrent", 0], found["recurrent", 1], found["recurrent", 2])
    log_decay = -torch.exp(module.time_decay)
    mean, after = wkv(log_decay, module.time_first, module.key(key), module.value(value), before, states.is_token)
    found |= {("recurrent", index): state for index, state in enumerate(after)}
    return module.output(receptance * mean), None


def _feed_forward(
    module: Any, states: TokenStates, hidden: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    key, receptance = _mixed(module, hidden, states, "key", "receptance")
    value = module.value(torch.square(torch.relu(module.key(key))))
    return torch.sigmoid(module.receptance(receptance)) * value, None


def _attention_shapes(module: Any) -> dict[StateKey, tuple[int, ...]]:
    size = module.key.out_features
    return {("conv", 0): (module.key.in_features, 1)} | {("recurrent", index): (size,) for index in range(3)}


def _feed_forward_shapes(module: Any) -> dict[StateKey, tuple[int, ...]]:
    return {("conv", 0): (module.key.in_features, 1)}


RULES = (
    ModuleRule("RwkvSelfAttention", _attention_shapes, _attend),
    ModuleRule("RwkvFeedForward", _feed_forward_shapes, _feed_forward),
)
