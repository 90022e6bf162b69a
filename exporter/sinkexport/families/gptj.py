"""GPT-J and CodeGen: partial, interleaved RoPE from a table of sinusoids.

Each attention module holds the table; since transformers 5.24 one module of the model does. The table ends at the
longest text of training. In its place comes a rotary embedding as other families have it, whose frequencies are those
that the table was made of (RoFormer, arXiv:2104.09864).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

CODEGEN_BLOCKS = 4
"""CodeGen's projection is laid out in blocks, one for each of the accelerators that it was trained on."""


class Sinusoids(torch.nn.Module):
    """cos and sin of R / 2 angles. inv_freq: float32 [R/2], radians a token."""

    def __init__(self, rotary_dim: int) -> None:
        super().__init__()
        inv_freq = 1.0 / 10000.0 ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64) / rotary_dim)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids: int64 [B, T] -> [B, T, R/2] each, in the type of x."""
        angles = position_ids[..., None].float() * self.inv_freq
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def sinusoids(model: Any) -> torch.nn.Module:
    """The rotary embedding of a model that has tables."""
    attention = model.transformer.h[0].attn
    return Sinusoids(attention.rotary_dim or attention.embed_dim)


def rotate(module: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The family's own rotation of the first R dimensions of x [B, H, T, D] by cos, sin [B, T, R/2]."""
    apply = importlib.import_module(type(module).__module__).apply_rotary_pos_emb
    x, rotary_dim = x.transpose(1, 2), 2 * cos.shape[-1]  # [B, T, H, D]
    turned = apply(x[..., :rotary_dim], sin, cos)
    return torch.cat((turned, x[..., rotary_dim:]), dim=-1).transpose(1, 2)


def attention(
    attend: Callable[..., tuple[torch.Tensor, None]],
    model: Any,
    module: Any,
    hidden_states: torch.Tensor,
    *_: Any,
    position_ids: torch.Tensor | None = None,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """Replaces ``GPTJAttention.forward`` and ``CodeGenAttention.forward``: hidden_states [B, T, N] -> [B, T, N]."""
    batch, num_tokens, _width = hidden_states.shape
    shape = (batch, num_tokens, module.num_attention_heads, module.head_dim)
    if hasattr(module, "qkv_proj"):
        blocks = module.qkv_proj(hidden_states).reshape(batch, num_tokens, CODEGEN_BLOCKS, -1)
        q, v, k = blocks.chunk(3, dim=-1)
    else:
        q, k, v = (project(hidden_states) for project in (module.q_proj, module.k_proj, module.v_proj))
    q, k, v = (x.reshape(shape).transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    rotary = getattr(model.transformer, "rotary_emb", None)
    if rotary is None or type(rotary).__module__ == type(module).__module__:  # or the table, with sin before cos
        rotary = sinusoids(model)
    cos, sin = rotary(q, position_ids)
    q, k = (rotate(module, x, cos, sin) for x in (q, k))
    out, _weights = attend(module, q, k, v, None, scaling=module.head_dim**-0.5)
    return module.out_proj(out.flatten(2)), None
