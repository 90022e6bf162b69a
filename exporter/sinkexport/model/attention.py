"""The torch form of the two operators that the exported graphs are made of.

Both are opaque to the tracer: a traced model contains one node for each call, which graph passes then turn into
standard ONNX operators or leave for a plugin. The bodies here really compute, so that the traced model can also
be run in torch and compared with the float64 oracle.
"""

from __future__ import annotations

import torch
from sinkrt.ring import TURN


@torch.library.custom_op("sinkexport::stream_angles", mutates_args=())
def stream_angles(
    position: torch.Tensor, frequency: torch.Tensor, num_tokens: int, behind: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of ``max(0, t - behind) * frequency`` turns, exact to float32 below ``POSITION_LIMIT``.

    position: int64 [B], of the first of num_tokens = T tokens in a row: t = position + 0 .. T-1.
    frequency: int64 [R/2], turns a token in units of 2^-32.
    behind: tokens; 0 gives the rotation of a token itself, C - 1 the shift that brings it back to the sinks.
    Returns: cos, sin float32 [B, T, R/2].

    float32 ``t * inv_freq`` is 0.25 rad wrong at t = 4M; here the phase is an integer modulo 2^32 and only its
    final value in [-pi, pi) is rounded. t is split as hi * 2^16 + lo to keep every product inside int64.
    """
    t = position[:, None] + torch.arange(num_tokens)  # [B, T]
    t = (t - behind).clamp(min=0)[:, :, None]  # [B, T, 1]
    hi, lo = t // 2**16, t % 2**16
    phase = (hi * frequency % TURN * 2**16 + lo * frequency) % TURN  # [B, T, R/2]
    centred = (phase + TURN // 2) % TURN - TURN // 2  # in [-2^31, 2^31): halves the rounding
    angle = centred.to(torch.float32) * (2 * torch.pi / TURN)
    return angle.cos(), angle.sin()


@stream_angles.register_fake
def _(
    position: torch.Tensor, frequency: torch.Tensor, num_tokens: int, behind: int
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (position.shape[0], num_tokens, frequency.shape[0])
    return torch.empty(shape, dtype=torch.float32), torch.empty(shape, dtype=torch.float32)


@torch.library.custom_op("sinkexport::sink_attention", mutates_args=())
def sink_attention(
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
    num_valid: torch.Tensor | None,
    scale: float,
    softcap: float,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """T tokens of attention over sinks and window, as if they came one by one (StreamingLLM, arXiv:2309.17453).

    q: [B, Hq, T, D], k and v: [B, Hkv, T, D], rotated at their stream position; 1 <= T <= W.
    position: int64 [B], of the first token. num_valid: int64 [B], how many of the T tokens count, 0 .. T; None: all.
    The others are computed and dropped: they change no state, and their outputs mean nothing.
    sink_k, sink_v: [B, Hkv, S, D] (None if S = 0), window_k, window_v: [B, Hkv, W, D].
    shift_cos, shift_sin: [B, T, R/2], of ``max(0, t - (C - 1))`` tokens: the query is turned back by it for the
    sinks, whose distance stops growing once the cache is full (None: no sinks or no positions).
    softcap: 0 for none, else logits become ``softcap * tanh(logits / softcap)`` (Gemma 2, arXiv:2408.00118).
    Returns: attention output [B, Hq, T, D] and the four states afterwards ([B, Hkv, 0, D] for absent sinks).
    """
    if sink_k is None or sink_v is None:
        sink_k = sink_v = window_k.new_zeros(*window_k.shape[:2], 0, window_k.shape[3])
    q_sink = q
    if shift_cos is not None and shift_sin is not None:
        q_sink = torch.onnx.ops.rotary_embedding(
            q, shift_cos, -shift_sin, interleaved=interleaved, rotary_embedding_dim=2 * shift_cos.shape[-1]
        )
    states = sink_k, sink_v, window_k, window_v
    outputs = []
    for i in range(q.shape[2]):
        this, this_for_sinks, this_k, this_v = (x[:, :, i : i + 1] for x in (q, q_sink, k, v))
        out, updated = _one_token(this, this_for_sinks, this_k, this_v, states, position + i, scale, softcap)
        outputs.append(out)
        if num_valid is None:
            states = updated
        else:
            counts = (i < num_valid)[:, None, None, None]
            sink_k, sink_v, window_k, window_v = (
                torch.where(counts, new, old) for new, old in zip(updated, states, strict=True)
            )
            states = sink_k, sink_v, window_k, window_v
    sink_k, sink_v, window_k, window_v = states
    # A custom operator must not hand back what it was given.
    return torch.cat(outputs, dim=2), sink_k.clone(), sink_v.clone(), window_k.clone(), window_v.clone()


States = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _one_token(
    q: torch.Tensor,
    q_sink: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    states: States,
    position: torch.Tensor,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, States]:
    """Write one token and attend. q, q_sink: [B, Hq, 1, D]; k, v: [B, Hkv, 1, D]. Returns the output and the states."""
    sink_k, sink_v, window_k, window_v = states
    num_sinks, (_, num_kv_heads, window_size, head_dim) = sink_k.shape[2], window_k.shape
    is_token = (torch.arange(num_sinks) == position[:, None])[:, None, :, None]  # [B, 1, S, 1]
    sink_k, sink_v = torch.where(is_token, k, sink_k), torch.where(is_token, v, sink_v)
    slot = ((position - num_sinks) % window_size)[:, None, None, None].expand(-1, num_kv_heads, 1, head_dim)
    window_k, window_v = window_k.scatter(2, slot, k), window_v.scatter(2, slot, v)
    group = q.shape[1] // num_kv_heads

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(group, dim=1)  # [B, Hq, ., D]

    logits = torch.cat((q_sink @ heads(sink_k).mT, q @ heads(window_k).mT), dim=-1) * scale  # [B, Hq, 1, C]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    # Sink j is there from t = j on, slot i from t = S + i on: entry n of sinks-then-slots from t = n on.
    is_there = torch.arange(num_sinks + window_size) <= position[:, None]  # [B, C]
    weights = logits.masked_fill(~is_there[:, None, None, :], float("-inf")).softmax(dim=-1)
    out = weights @ heads(torch.cat((sink_v, window_v), dim=2))
    return out, (sink_k, sink_v, window_k, window_v)


@sink_attention.register_fake
def _(
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
    num_valid: torch.Tensor | None,
    scale: float,
    softcap: float,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    none = window_k.new_empty(q.shape[0], window_k.shape[1], 0, q.shape[3])
    sinks = [none if s is None else torch.empty_like(s) for s in (sink_k, sink_v)]
    return torch.empty_like(q), sinks[0], sinks[1], torch.empty_like(window_k), torch.empty_like(window_v)
