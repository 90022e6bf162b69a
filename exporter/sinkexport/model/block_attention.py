"""The block mode of sink attention, in torch: what a video or audio model that makes a frame at a time is traced with.

A block is what the model makes at once: a frame, or a few, of T tokens. Inside a block attention is bidirectional,
across blocks it is causal: the cache holds the first S blocks (the frame sinks of LongLive, arXiv:2509.22622, and
Rolling Forcing, arXiv:2509.25161) and the last W, the one at hand included. All positions count blocks; tokens of one
block share theirs. Rotation over space, within a block, is the model's own business: it never changes.
"""

from __future__ import annotations

import torch

from sinkexport.model.attention import rotated

FiveTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op("sinkexport::block_attention", mutates_args=())
def block_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink_k: torch.Tensor | None,
    sink_v: torch.Tensor | None,
    window_k: torch.Tensor,
    window_v: torch.Tensor,
    position: torch.Tensor,
    shift_cos: torch.Tensor | None,
    shift_sin: torch.Tensor | None,
    oldest: torch.Tensor,
    scale: float,
    interleaved: bool,
) -> FiveTensors:
    """One block of T tokens over sinks and window. Run again at the same position, it replaces what it wrote.

    q: [B, Hq, T, D], k and v: [B, Hkv, T, D], rotated over time at their stream position, in blocks.
    sink_k, sink_v: [B, Hkv, S * T, D] (None if S = 0), window_k, window_v: [B, Hkv, W * T, D]; block u of the window is
    in rows ((u - S) mod W) * T and on.
    position: int64 [B], the block. oldest: int64 [B], window blocks before it are not seen: 0 in a stream that goes on,
    the first block to be rebuilt in a recache, when the slots of later blocks still hold what is to be replaced.
    shift_cos, shift_sin: [B, T, R/2], the same for all tokens, of ``max(0, position - (S + W - 1))`` blocks: the query
    is turned back by it for the sinks (None: no sinks or no rotation over time).
    Returns: attention output [B, Hq, T, D] and the four states afterwards, those that are absent without elements.
    """
    num_tokens, group = q.shape[2], q.shape[1] // k.shape[1]
    absent = k.new_zeros(*k.shape[:2], 0, k.shape[3])
    sinks = [absent if state is None else state for state in (sink_k, sink_v)]
    num_sinks, window_size = sinks[0].shape[2] // num_tokens, window_k.shape[2] // num_tokens  # S, W
    block = torch.arange(num_sinks).repeat_interleave(num_tokens)  # [S * T]
    is_this = (block == position[:, None])[:, None, :, None]  # [B, 1, S * T, 1]
    new_sinks = [
        torch.where(is_this, new.repeat(1, 1, num_sinks, 1), old) for new, old in zip((k, v), sinks, strict=True)
    ]
    slot = (position - num_sinks) % window_size  # [B]
    rows = (slot[:, None] * num_tokens + torch.arange(num_tokens))[:, None, :, None]  # [B, 1, T, 1]
    new_window = [
        old.scatter(2, rows.expand_as(new), new) for new, old in zip((k, v), (window_k, window_v), strict=True)
    ]
    q_sink = q
    if shift_cos is not None and shift_sin is not None:
        q_sink = rotated(q, shift_cos, -shift_sin, interleaved=interleaved)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(group, dim=1)  # [B, Hq, ., D]

    logits = torch.cat((q_sink @ heads(new_sinks[0]).mT, q @ heads(new_window[0]).mT), dim=-1) * scale
    slots = torch.arange(window_size)
    held = position[:, None] - (slot[:, None] - slots) % window_size  # [B, W], the block in each slot
    is_there = (held >= num_sinks) & (held >= oldest[:, None])
    is_seen = torch.cat((block <= position[:, None], is_there.repeat_interleave(num_tokens, dim=1)), dim=1)
    weights = logits.masked_fill(~is_seen[:, None, None, :], float("-inf")).softmax(dim=-1)
    out = weights @ heads(torch.cat((new_sinks[1], new_window[1]), dim=2))
    return out, new_sinks[0], new_sinks[1], new_window[0], new_window[1]


@block_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    _v: torch.Tensor,
    sink_k: torch.Tensor | None,
    sink_v: torch.Tensor | None,
    window_k: torch.Tensor,
    window_v: torch.Tensor,
    *_others: object,
) -> FiveTensors:
    absent = k.new_empty(*k.shape[:2], 0, k.shape[3])
    sinks = [absent.clone() if state is None else torch.empty_like(state) for state in (sink_k, sink_v)]
    return torch.empty_like(q), sinks[0], sinks[1], torch.empty_like(window_k), torch.empty_like(window_v)
