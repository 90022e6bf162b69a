"""Doge: a bias of each key, computed of its value, which also decides what is left out (dynamic mask attention,
arXiv:2412.11834).

Nothing is left out of texts of at most `keep_window_size` tokens. The bias becomes one more element of the key, which
the query multiplies by one.
"""

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
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    *_: Any,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """Replaces ``DogeAttention.forward``: hidden_states [B, T, N] -> [B, T, N]."""
    rotate = importlib.import_module(type(module).__module__).apply_rotary_pos_emb
    heads = (*hidden_states.shape[:-1], -1, module.head_dim)
    values = module.v_proj(hidden_states)
    q = module.q_norm(module.q_proj(hidden_states).view(heads)).transpose(1, 2)
    k = module.k_norm(module.k_proj(hidden_states).view(heads)).transpose(1, 2)
    q, k = rotate(q, k, *position_embeddings)
    bias = torch.exp(module.A * torch.nn.functional.softplus(module.dt_proj(values)))  # [B, T, Hkv]
    q = torch.cat((q, torch.ones_like(q[..., :1])), dim=-1)
    k = torch.cat((k, bias.transpose(1, 2)[..., None] / module.scaling), dim=-1)  # [B, Hkv, T, D + 1]
    out, _weights = attend(module, q, k, values.view(heads).transpose(1, 2), None, scaling=module.scaling)
    return module.o_proj(out.flatten(2)), None
