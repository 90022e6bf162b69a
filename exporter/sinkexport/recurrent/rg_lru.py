"""The recurrent block of Griffin and RecurrentGemma (arXiv:2402.19427): a short convolution, then the RG-LRU."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from sinkexport.recurrent.modules import ModuleRule, TokenStates
from sinkexport.recurrent.scan import linear_scan
from sinkexport.recurrent.states import StateKey


def _shapes(block: Any) -> dict[StateKey, tuple[int, ...]]:
    width, num_kept = block.conv_1d.in_channels, block.conv_1d.kernel_size[0] - 1
    conv: dict[StateKey, tuple[int, ...]] = {("conv", 0): (width, num_kept)} if num_kept else {}
    return conv | {("recurrent", 0): (width,)}


def _forward(block: Any, states: TokenStates, inputs: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
    """inputs: [B, T, N] -> the same.

    transformers resets the state at position 0, where a stream begins; a position in the cache is no such thing.
    """

    def scan(
        hidden_states: torch.Tensor, recurrent_gate: torch.Tensor, reset: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, None]:
        counts = states.is_token[..., None]
        decay = torch.where(counts, recurrent_gate.float() * ~reset, 1.0)
        h = linear_scan(decay, torch.where(counts, hidden_states.float(), 0.0), states.states["recurrent", 0])
        states.states["recurrent", 0] = h[:, -1]
        return h.to(hidden_states.dtype), None

    branch = block.act_fn(block.linear_y(inputs))
    seen = block.linear_x(inputs).transpose(1, 2)  # [B, N, T]
    if ("conv", 0) in states.states:  # one of a single tap keeps nothing
        seen = states.window(seen)  # [B, N, K + T]
    conv = block.conv_1d
    mixed = torch.nn.functional.conv1d(seen, conv.weight, conv.bias, groups=conv.groups).transpose(1, 2)
    with mock.patch.object(block.rg_lru, "_rnn_scan", scan), mock.patch.object(block.rg_lru, "recurrent_states", None):
        hidden = block.rg_lru(mixed, (~states.begins).to(torch.int64))
    return block.linear_out(hidden * branch), None


RULES = (ModuleRule("RecurrentGemmaRecurrentBlock", _shapes, _forward),)
