"""GPT-NeoX Japanese: RoPE, partial in some models, with an attention of its own beside transformers' interface."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch


def attention(
    attend: Callable[..., tuple[torch.Tensor, None]],
    _model: Any,
    module: Any,
    hidden_states: torch.Tensor,
    *_: Any,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **__: Any,
) -> tuple[torch.Tensor, None, torch.Tensor | None]:
    """Replaces ``GPTNeoXJapaneseAttention.forward``: hidden_states [B, T, N] -> [B, T, N], and the output's bias."""
    rotate = importlib.import_module(type(module).__module__).apply_rotary_pos_emb
    batch, num_tokens, _width = hidden_states.shape
    fused = module.query_key_value(hidden_states).view(batch, num_tokens, module.num_attention_heads, -1)
    q, k, v = (x.transpose(1, 2) for x in fused.chunk(3, dim=-1))  # [B, H, T, D]
    size = module.rotary_ndims
    turned = rotate(q[..., :size], k[..., :size], *position_embeddings)
    q, k = (torch.cat((one, x[..., size:]), dim=-1) for one, x in zip(turned, (q, k), strict=True))
    out, _weights = attend(module, q, k, v, None, scaling=1.0 / module.norm_factor)
    return module.dense(out.flatten(2)), None, module.dense_bias
