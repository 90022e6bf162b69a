"""Falcon: RoPE (7B: one key head; 40B and later: groups) or ALiBi (falcon-rw)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from sinkexport.families.alibi import slopes


def has_alibi(config: Any) -> bool:
    """Whether this Falcon has ALiBi; RoPE otherwise."""
    return bool(config.alibi)


def attention(
    attend: Callable[..., tuple[torch.Tensor, None]],
    model: Any,
    module: Any,
    hidden_states: torch.Tensor,
    *_: Any,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """Replaces ``FalconAttention.forward``: hidden_states [B, T, N] -> [B, T, N].

    transformers repeats the key heads of the groups before it attends, and would keep each of them as often.
    """
    fused = module.query_key_value(hidden_states)
    batch, num_tokens, _width = fused.shape
    groups = module.num_kv_heads
    if module.new_decoder_architecture or module.multi_query:
        fused = fused.view(batch, num_tokens, groups, module.num_heads // groups + 2, module.head_dim)
        q, k, v = fused[..., :-2, :].flatten(2, 3), fused[..., -2, :], fused[..., -1, :]
    else:
        q, k, v = fused.view(batch, num_tokens, module.num_heads, 3, module.head_dim).unbind(3)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, Hq or Hkv, T, D]
    arguments = {}
    if has_alibi(model.config):
        # In bfloat16 and divided by sqrt(D), as the family does. It rounds slope * place to bfloat16 as well, which
        # makes a bias of a place in the text, not of a distance: that is left out.
        arguments["alibi_slopes"] = slopes(module.num_heads).bfloat16().float() * module.inv_norm_factor
    elif position_embeddings is not None:
        rotate = importlib.import_module(type(module).__module__).apply_rotary_pos_emb
        q, k = rotate(q, k, *position_embeddings)
    out, _weights = attend(module, q, k, v, None, scaling=module.inv_norm_factor, **arguments)
    return module.dense(out.flatten(2)), None
