"""MPT: ALiBi, and queries, keys and values that may be clipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sinkexport.families.alibi import slopes


def attention(
    attend: Callable[..., tuple[torch.Tensor, None]],
    _model: Any,
    module: Any,
    hidden_states: torch.Tensor,
    *_: Any,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """Replaces ``MptAttention.forward``: hidden_states [B, T, N] -> [B, T, N]."""
    qkv = module.Wqkv(hidden_states)  # [B, T, 3 * N]
    if module.clip_qkv:
        qkv = qkv.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    shape = (*hidden_states.shape[:2], module.n_heads, module.head_dim)
    q, k, v = (x.reshape(shape).transpose(1, 2) for x in qkv.chunk(3, dim=2))  # [B, H, T, D]
    out, _weights = attend(module, q, k, v, None, scaling=module.softmax_scale, alibi_slopes=slopes(module.n_heads))
    return module.out_proj(out.flatten(2)), None
