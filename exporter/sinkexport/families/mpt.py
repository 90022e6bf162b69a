"""MPT: ALiBi with slopes of its own, and queries, keys and values that may be clipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


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


def slopes(num_heads: int, bias_max: float = 8.0) -> torch.Tensor:
    """float32 [num_heads]: 2^(-bias_max * i / n), i = 1 .. n, for n heads, a power of two.

    For other numbers those of the next higher power of two, every second one first. transformers passes no other
    bias_max, whatever the configuration says.
    """
    n = 2 ** math.ceil(math.log2(num_heads))
    values = torch.tensor([2.0 ** (-bias_max * i / n) for i in range(1, n + 1)])
    return values if n == num_heads else torch.cat((values[1::2], values[::2]))[:num_heads]
