"""BLOOM: ALiBi, a bias of slope * place of the key, which softmax cannot distinguish from - slope * distance."""

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
    residual: torch.Tensor,
    *_: Any,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """Replaces ``BloomAttention.forward``: hidden_states and residual [B, T, N] -> [B, T, N]."""
    q, k, v = module._reshape(module.query_key_value(hidden_states))  # [B, H, T, D] each
    out, _weights = attend(module, q, k, v, None, scaling=module.inv_norm_factor, alibi_slopes=slopes(module.num_heads))
    return residual + module.dense(out.flatten(2)), None
