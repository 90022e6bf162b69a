"""GPT-NeoX Japanese: partial RoPE, and a bias of the last layer's output that the layer around attention adds."""

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
    """Replaces ``GPTNeoXJapaneseAttention.forward``: hidden_states [B, T, N] -> [B, T, N], None and the bias [N]."""
    batch, num_tokens, _width = hidden_states.shape
    fused = module.query_key_value(hidden_states).view(batch, num_tokens, module.num_attention_heads, -1)
    q, k, v = fused.transpose(1, 2).chunk(3, dim=-1)  # [B, H, T, D]
    rotary_dim = module.rotary_ndims
    rotate = importlib.import_module(type(module).__module__).apply_rotary_pos_emb
    turned = rotate(q[..., :rotary_dim], k[..., :rotary_dim], *position_embeddings)
    q, k = (torch.cat((part, x[..., rotary_dim:]), dim=-1) for part, x in zip(turned, (q, k), strict=True))
    out, _weights = attend(module, q, k, v, None, scaling=1.0 / module.norm_factor)
    return module.dense(out.flatten(2)), None, module.dense_bias
