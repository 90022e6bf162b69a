"""Hashed n-grams (Qwen4 exp): a token's embedding by the ids before it, and a dilated convolution of what it adds."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from sinkexport.recurrent.modules import ModuleRule, TokenStates
from sinkexport.recurrent.states import StateKey


def _ngram_shapes(module: Any) -> dict[StateKey, tuple[int, ...]]:
    return {("recurrent", 0): (module.context_len,)}


def _ngram_forward(module: Any, states: TokenStates, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """input_ids: int64 [B, T] -> [B, T, N].

    The state has the last ids plus 1, and 0 where there was no token yet, which counts as the end of a text does.
    """
    before, num_tokens = states.states["recurrent", 0], input_ids.shape[1]
    seen = torch.cat([before, (input_ids + 1).to(before.dtype)], dim=1)  # [B, n + T], exact up to 2^24
    if states.num_valid is not None:
        after = seen.index_select(1, states.num_valid + torch.arange(module.context_len))
    else:
        after = seen[:, num_tokens:]
        if num_tokens == 1:
            after = torch.where(states.is_token, after, seen[:, :-1])
    states.states["recurrent", 0] = after
    ids = seen.to(torch.int64) - 1
    ids = torch.where(ids < 0, module.eos_token_id, ids)
    # An end of a text hides what came before it.
    shifted, is_hidden = [ids[:, module.context_len :]], torch.zeros((), dtype=torch.bool)
    for shift in range(1, module.ngram_size):
        one = ids[:, module.context_len - shift : module.context_len - shift + num_tokens]
        is_hidden = is_hidden | (one == module.eos_token_id)
        shifted.append(torch.where(is_hidden, module.eos_token_id, one))
    rows, mixed = [], shifted[0] * module.layer_multipliers[0]
    for ngram in range(1, module.ngram_size):
        mixed = torch.bitwise_xor(mixed, shifted[ngram] * module.layer_multipliers[ngram])
        heads = slice((ngram - 1) * module.heads_per_ngram, ngram * module.heads_per_ngram)
        rows.append(mixed[..., None] % module.ngram_heads_vocab_sizes[heads] + module.ngram_heads_offsets[heads])
    embedded: torch.Tensor = module.ngram_embedding(torch.cat(rows, dim=-1)).flatten(-2)
    return embedded


def _layer_shapes(module: Any) -> dict[StateKey, tuple[int, ...]]:
    return {("conv", 0): (module.conv1d.in_channels, module.short_conv_state_len)}


def _layer_forward(module: Any, states: TokenStates, *arguments: Any, **named: Any) -> torch.Tensor:
    def convolve(hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
        seen = states.window(hidden_states.transpose(1, 2))
        return torch.nn.functional.silu(module.conv1d(seen)).transpose(1, 2)

    with mock.patch.object(module, "_short_conv", convolve):
        added: torch.Tensor = type(module).forward(module, *arguments, **named)
    return added


RULES = (
    ModuleRule("Qwen4ExpTextNGramEmbedding", _ngram_shapes, _ngram_forward, is_beside=True),
    ModuleRule("Qwen4ExpTextPLELayer", _layer_shapes, _layer_forward, is_beside=True),
)
