"""Attention of a chunk of tokens: what each of them sees, how queries and keys turn, and the matmuls."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from sinkrt.ring import Ring

from sinkexport.families.rope import RotarySpec, rotate

CosSin = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, float32 [T, R/2] each."""


@dataclasses.dataclass(frozen=True)
class Entries:
    """Tokens that a chunk attends to: the sinks there are, then the window's tokens, n together.

    is_seen: bool [T, n]. distance: int64 [T, n], in the cache; any where nothing is seen. The window's columns begin
    with the oldest token that the chunk's first one sees, and end with the chunk's last. window: int64, those tokens.
    """

    is_seen: torch.Tensor
    distance: torch.Tensor
    window: torch.Tensor


def visible(ring: Ring, position: int, num_tokens: int) -> Entries:
    """The entries of a chunk whose first token is at `position`."""
    num_sinks, window_size = ring.num_sink_tokens, ring.window_size
    end = position + num_tokens
    query = torch.arange(position, end)[:, None]  # [T, 1]
    sinks = torch.arange(min(num_sinks, end))
    first = max(num_sinks, position - window_size + 1)
    window = torch.arange(first, max(first, end))  # none while all tokens are sinks
    is_seen = torch.cat((sinks <= query, (window <= query) & (query - window < window_size)), dim=1)
    place = query.clamp(max=ring.capacity - 1)  # from there on a sink's distance stays
    return Entries(is_seen=is_seen, distance=torch.cat((place - sinks, query - window), dim=1), window=window)


def turn(position: int, num_tokens: int, behind: int, frequency: torch.Tensor) -> CosSin:
    """cos and sin of ``max(0, t - behind) * frequency`` turns for T tokens from `position` on.

    frequency: int64 [R/2], turns a token in units of 2^-32. Products wrap modulo 2^64, so phases modulo 2^32 are exact.
    Their angles are rounded to float32, as graphs round them, with an error of 2^-22 pi at most. Calibration streams by
    this: its files, and bundles made from them, depend on every bit.
    """
    t = np.maximum(np.arange(position, position + num_tokens) - behind, 0).astype(np.uint64)
    phase = (t[:, None] * frequency.numpy().astype(np.uint64)).astype(np.uint32).astype(np.int32)  # in [-2^31, 2^31)
    angle = torch.from_numpy(phase.astype(np.float32)) * (2 * np.pi / 2**32)
    return angle.cos(), angle.sin()


def rotated(x: torch.Tensor, cos_sin: CosSin, spec: RotarySpec, factor: float = 1.0) -> torch.Tensor:
    """x [B, H, T, D] turned by cos, sin [T, R/2]; the dimensions that turn are multiplied by `factor`."""
    cos, sin = ((c * factor).to(x.dtype) for c in cos_sin)
    return rotate(x, cos, sin, spec)


def logits_of(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q [B, Hq, T, D] . k [B, Hkv, n, D] -> [B, Hq, T, n]; each key head serves Hq / Hkv query heads in a row."""
    batch, num_q_heads, num_tokens, head_dim = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, head_dim)  # [B, Hkv, G * T, D]
    return (grouped @ k.mT).reshape(batch, num_q_heads, num_tokens, k.shape[2])


def weighted(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """weights [B, Hq, T, n] . v [B, Hkv, n, D] -> [B, Hq, T, D]."""
    batch, num_q_heads, num_tokens, n = weights.shape
    grouped = weights.reshape(batch, v.shape[1], -1, n)  # [B, Hkv, G * T, n]
    return (grouped @ v).reshape(batch, num_q_heads, num_tokens, v.shape[3])
