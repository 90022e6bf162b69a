"""The torch form of the two operators that the exported graphs are made of.

Both are opaque to the tracer: a traced model contains one node for each call, which graph passes then turn into
standard ONNX operators or leave for a plugin. The bodies here really compute, so that the traced model can also
be run in torch and compared with the float64 oracle.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from sinkrt.contract import MASS_KIND, SCALE_KINDS, STATE_KINDS
from sinkrt.ring import TURN

from sinkexport.model.int8_rows import SCALE_DTYPE, dequantized, quantized

TINY = 1e-30
"""Sums of weights are divided by no less: a float32 that no sum of real weights comes near."""


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
    final value in [-pi, pi) is rounded. t is split as hi * 2^16 + lo to keep every multiplication inside int64.
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
    position: torch.Tensor, frequency: torch.Tensor, num_tokens: int, _behind: int
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (position.shape[0], num_tokens, frequency.shape[0])
    return torch.empty(shape, dtype=torch.float32), torch.empty(shape, dtype=torch.float32)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """x [B, H, T, D], its leading R dimensions turned by the angles of cos, sin [B, T, R/2]."""
    rotary_dim = 2 * cos.shape[-1]
    partial = rotary_dim if rotary_dim < x.shape[-1] else 0  # 0: all of the head
    turned: torch.Tensor = torch.onnx.ops.rotary_embedding(
        x, cos, sin, interleaved=interleaved, rotary_embedding_dim=partial
    )
    return turned


EightTensors = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]


def _sink_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    sink_k: torch.Tensor | None,
    sink_v: torch.Tensor | None,
    window_k: torch.Tensor,
    window_v: torch.Tensor | None,
    position: torch.Tensor,
    shift_cos: torch.Tensor | None,
    shift_sin: torch.Tensor | None,
    num_valid: torch.Tensor | None,
    scale: float,
    softcap: float,
    interleaved: bool,
    window_k_scale: torch.Tensor | None = None,
    window_v_scale: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sink_logit: torch.Tensor | None = None,
    sink_scale: torch.Tensor | None = None,
    affine_scale: torch.Tensor | None = None,
    affine_bias: torch.Tensor | None = None,
    attention_mass: torch.Tensor | None = None,
    calibrated: torch.Tensor | None = None,
    act_alpha: float = 1.0,
    act_beta: float = 1.0,
    act_min_queries: int = 1,
    latent_dim: int = 0,
) -> EightTensors:
    """T tokens of attention over sinks and window, as if they came one by one (StreamingLLM, arXiv:2309.17453).

    q: [B, Hq, T, D], k: [B, Hkv, T, D], rotated at their stream position; v: [B, Hkv, T, Dv]; 1 <= T <= W.
    position: int64 [B], of the first token. num_valid: int64 [B], how many of the T tokens count, 0 .. T; None: all.
    The others are computed and dropped: they change no state, and their outputs mean nothing.
    sink_k, sink_v: [B, Hkv, S, D and Dv] (None if S = 0), window_k, window_v: [B, Hkv, W, D and Dv].
    window_k_scale, window_v_scale: float16 [B, Hkv, W] where the window is int8 (model/int8_rows.py), else None. A
    token is quantised once, when it comes, and is seen so by itself and by all later ones; sinks are not quantised.
    latent_dim: 0, or for latent attention Dv: values are the last Dv elements of keys, and v, sink_v, window_v None. In
    an int8 window the last Dv elements have window_v_scale, the others window_k_scale.
    shift_cos, shift_sin: [B, T, R/2], of ``max(0, t - (C - 1))`` tokens: the query is turned back by it for the
    sinks, whose distance stops growing once the cache is full (None: no sinks or no positions).
    softcap: 0 for none, else logits become ``softcap * tanh(logits / softcap)`` (Gemma 2, arXiv:2408.00118).
    alibi_slopes: float32 [Hq]; a logit loses slope * in-cache distance, after softcap (ALiBi, arXiv:2108.12409).
    sink_logit: [Hq], one more logit of each softmax, without a value (gpt-oss, arXiv:2508.10925).
    sink_scale: float32 [Hq] > 0, factor on the weight of token 0 before weights are normalised: its logarithm is added
    to the logit, after the softcap (ZeroTuning, arXiv:2505.11739). None: no factors. Needs a sink.
    affine_scale, affine_bias: [B or 1, Hq, T or 1], a and b of each query: a softmax weight w becomes a w + b / n, n
    being the tokens that the query sees (affine-scaled attention, arXiv:2602.23057). None: a = 1, b = 0.
    attention_mass: float32 [B, Hq, 2, W], a state: the weights that the token in each slot has received since it came,
    summed up, after the last token at an even position and after that at an odd one. With it, later sinks are scaled
    down in the heads of calibrated, float32 [Hq] of 0 and 1, as `ActTuning` says (sinkrt.contract; ACT,
    arXiv:2406.15765), after all that made the weights. Needs a sink.
    Returns: attention output [B, Hq, T, Dv] and the seven states afterwards, those that are absent without elements.
    """
    if v is None or window_v is None:
        sink_v = None if sink_k is None else sink_k[..., -latent_dim:]
        sink_k = None if sink_k is None else sink_k[..., :-latent_dim]
        v, window_v = k[..., -latent_dim:], window_k[..., -latent_dim:]
        k, window_k = k[..., :-latent_dim], window_k[..., :-latent_dim]
    (absent_k, absent_v), nothing = (q.new_zeros(*x.shape[:2], 0, x.shape[3]) for x in (k, v)), q.new_zeros(0)
    kept = (sink_k, sink_v, window_k, window_v, window_k_scale, window_v_scale, attention_mass)
    scales = (nothing.to(SCALE_DTYPE), nothing.to(SCALE_DTYPE))
    without = (absent_k, absent_v, absent_k, absent_v, *scales, nothing.float())
    states = tuple(other if state is None else state for state, other in zip(kept, without, strict=True))
    act = (
        None
        if calibrated is None
        else _Act(heads=calibrated, alpha=act_alpha, beta=act_beta, min_queries=act_min_queries)
    )
    logits = _Logits(
        scale=scale, softcap=softcap, alibi_slopes=alibi_slopes, sink_logit=sink_logit, sink_scale=sink_scale
    )
    q_sink = q
    if shift_cos is not None and shift_sin is not None:
        q_sink = rotated(q, shift_cos, -shift_sin, interleaved=interleaved)
    outputs = []
    for i in range(q.shape[2]):
        this, this_for_sinks, this_k, this_v = (x[:, :, i : i + 1] for x in (q, q_sink, k, v))
        updated = _written(states, this_k, this_v, position + i)
        a, b = (x if x is None or x.shape[2] == 1 else x[:, :, i : i + 1] for x in (affine_scale, affine_bias))
        attended, mass = _attended(this, this_for_sinks, updated, position + i, logits, act, a, b)
        outputs.append(attended)
        updated = (*updated[:6], mass)
        states = updated if num_valid is None else _chosen(i < num_valid, updated, states)
    # A custom operator must not hand back what it was given, nor one tensor twice.
    if latent_dim:
        rows = [torch.cat(pair, dim=-1) for pair in (states[:2], states[2:4])]
        states = (rows[0], absent_v, rows[1], absent_v, *states[4:])
    after = [state.clone() for state in states]
    return torch.cat(outputs, dim=2), after[0], after[1], after[2], after[3], after[4], after[5], after[6]


SIGNATURE = inspect.signature(_sink_attention)
sink_attention = torch.library.custom_op("sinkexport::sink_attention", _sink_attention, mutates_args=())
"""The operator: see `_sink_attention`. Its states are called as their kinds in `sinkrt.contract`."""

States = tuple[torch.Tensor, ...]
"""sink_k, sink_v, window_k, window_v, the window's scales (no elements: the window is in floating point), and
attention_mass (no elements: later sinks are not calibrated)."""


class _Logits(NamedTuple):
    """Steps from q . k to logits: parameters of `sink_attention` by these names."""

    scale: float
    softcap: float
    alibi_slopes: torch.Tensor | None
    sink_logit: torch.Tensor | None
    sink_scale: torch.Tensor | None


class _Act(NamedTuple):
    """Calibration of later sinks. heads: float32 [Hq] of 0 and 1."""

    heads: torch.Tensor
    alpha: float
    beta: float
    min_queries: int


def _written(states: States, k: torch.Tensor, v: torch.Tensor, position: torch.Tensor) -> States:
    """The states with one token more. k, v: [B, Hkv, 1, D and Dv]."""
    sink_k, sink_v, window_k, window_v, k_scale, v_scale, mass = states
    num_sinks, window_size = sink_k.shape[2], window_k.shape[2]
    is_token = (torch.arange(num_sinks) == position[:, None])[:, None, :, None]  # [B, 1, S, 1]
    sink_k, sink_v = torch.where(is_token, k, sink_k), torch.where(is_token, v, sink_v)
    slot = ((position - num_sinks) % window_size)[:, None, None]  # [B, 1, 1]
    if window_k.dtype == torch.int8:
        (k, new_k_scale), (v, new_v_scale) = quantized(k), quantized(v)
        k_scale, v_scale = (
            old.scatter(2, slot.expand_as(new), new) for old, new in ((k_scale, new_k_scale), (v_scale, new_v_scale))
        )
    window_k, window_v = (
        window.scatter(2, slot[..., None].expand_as(row), row) for window, row in ((window_k, k), (window_v, v))
    )
    return sink_k, sink_v, window_k, window_v, k_scale, v_scale, mass


def _chosen(counts: torch.Tensor, new: States, old: States) -> States:
    """New states of the streams whose token counts, bool [B], and old ones of the others."""
    return tuple(
        torch.where(counts.view(-1, *[1] * (x.dim() - 1)), x, before) if x.numel() else x
        for x, before in zip(new, old, strict=True)
    )


def _attended(
    q: torch.Tensor,
    q_sink: torch.Tensor,
    states: States,
    position: torch.Tensor,
    by: _Logits,
    act: _Act | None,
    affine_scale: torch.Tensor | None,
    affine_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one token that is written already. q, q_sink: [B, Hq, 1, D] -> [B, Hq, 1, Dv], and attention_mass.

    affine_scale, affine_bias: [B or 1, Hq, 1].
    """
    sink_k, sink_v, window_k, window_v, k_scale, v_scale, mass = states
    if window_k.dtype == torch.int8:
        window_k, window_v = dequantized(window_k, k_scale, q.dtype), dequantized(window_v, v_scale, q.dtype)
    if sink_k.shape[3] < q.shape[3]:  # of a latent cache: keys are both
        sink_k, window_k = torch.cat((sink_k, sink_v), dim=-1), torch.cat((window_k, window_v), dim=-1)
    num_sinks, window_size = sink_k.shape[2], window_k.shape[2]
    group = q.shape[1] // window_k.shape[1]
    sink_k, sink_v, window_k, window_v = (
        x.repeat_interleave(group, dim=1)
        for x in (sink_k, sink_v, window_k, window_v)  # [B, Hq, ., D]
    )
    # Sink j is there from t = j on, slot i from t = S + i on: entry n of sinks-then-slots from t = n on.
    is_there = torch.arange(num_sinks + window_size) <= position[:, None]  # [B, C]
    logits = torch.cat((q_sink @ sink_k.mT, q @ window_k.mT), dim=-1) * by.scale  # [B, Hq, 1, C]
    weights = _weights(logits, position, num_sinks, is_there, by)
    if act is not None:
        weights, mass = _calibrated(weights, mass, position, num_sinks, act)
    if affine_scale is not None:
        weights = weights * affine_scale[..., None]
    if affine_bias is not None:
        share = (is_there / is_there.sum(dim=1, keepdim=True)).to(weights.dtype)  # [B, C]
        weights = weights + affine_bias[..., None] * share[:, None, None, :]
    return weights @ torch.cat((sink_v, window_v), dim=2), mass


def _weights(
    logits: torch.Tensor, position: torch.Tensor, num_sinks: int, is_there: torch.Tensor, by: _Logits
) -> torch.Tensor:
    """Softmax weights of scaled logits [B, Hq, 1, C]. is_there: bool [B, C], sinks and slots that hold a token."""
    capacity = is_there.shape[1]
    if by.softcap:
        logits = by.softcap * torch.tanh(logits / by.softcap)
    if by.alibi_slopes is not None:
        distances = _distances(position, num_sinks, capacity - num_sinks)[:, None, None, :]  # [B, 1, 1, C]
        logits = logits - (by.alibi_slopes[:, None, None] * distances).to(logits.dtype)
    if by.sink_scale is not None:
        factor = by.sink_scale.log().to(logits.dtype)[:, None]  # [Hq, 1]
        logits = torch.cat((logits[..., :1] + factor[..., None], logits[..., 1:]), dim=-1)
    logits = logits.masked_fill(~is_there[:, None, None, :], float("-inf"))
    if by.sink_logit is not None:
        logits = torch.cat((logits, by.sink_logit[:, None, None].expand(*logits.shape[:-1], 1)), dim=-1)
    return logits.softmax(dim=-1)[..., :capacity]


def _calibrated(
    weights: torch.Tensor, mass: torch.Tensor, position: torch.Tensor, num_sinks: int, act: _Act
) -> tuple[torch.Tensor, torch.Tensor]:
    """weights [B, Hq, 1, C] with later sinks scaled down, and mass [B, Hq, 2, W] with what these weights add to it."""
    window_size, t = mass.shape[3], position[:, None]  # [B, 1]
    sinks, window = weights.float()[:, :, 0].split((num_sinks, window_size), dim=-1)  # [B, Hq, S] and [.., W]
    before = torch.where(t[..., None] % 2 == 1, mass[:, :, 0], mass[:, :, 1])  # [B, Hq, W]
    is_new = torch.arange(window_size) == (t - num_sinks) % window_size  # [B, W]: it has received nothing yet
    received = torch.where(is_new[:, None], 0.0, before) + window
    is_after = torch.arange(2) == t % 2  # [B, 2]
    mass = torch.where(is_after[:, None, :, None], received[:, :, None], mass)
    num_queries = (t - num_sinks - torch.arange(window_size)) % window_size + 1  # [B, W]
    share = (t + 1).clamp(max=num_sinks + window_size) / (num_queries * act.alpha)
    share = torch.where(num_queries >= act.min_queries, share, 0.0)[:, None]  # [B, 1, W]
    degree = torch.minimum((received * share - 1).clamp(min=0), act.heads[:, None])  # [B, Hq, W]
    taken = degree * window
    others = torch.cat((sinks, window - taken), dim=-1)
    # A sink that softmax left with nothing at all gets nothing, whatever there is to give.
    more = 1 + (1 - act.beta) * taken.sum(-1, keepdim=True) / others.sum(-1, keepdim=True).clamp(min=TINY)
    sinks, window = (others * more).split((num_sinks, window_size), dim=-1)
    return torch.cat((sinks, window + act.beta * taken), dim=-1)[:, :, None].to(weights.dtype), mass


def _distances(position: torch.Tensor, num_sinks: int, window_size: int) -> torch.Tensor:
    """In-cache distance of each sink and slot to the token at `position` [B], int64 [B, C]; any if nothing is there.

    A sink's stops growing once the cache is full.
    """
    t = position[:, None]
    sinks = t.clamp(max=num_sinks + window_size - 1) - torch.arange(num_sinks)
    return torch.cat((sinks, (t - num_sinks - torch.arange(window_size)) % window_size), dim=1)


@sink_attention.register_fake
def _(*arguments: Any, **named: Any) -> EightTensors:
    """Empty tensors of the shapes that `sink_attention` returns."""
    bound = SIGNATURE.bind(*arguments, **named)
    bound.apply_defaults()
    given = bound.arguments
    q, v, nothing = given["q"], given["v"], given["q"].new_empty(0)
    v = given["k"][..., -given["latent_dim"] :] if v is None else v
    absent_k, absent_v = (x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (given["k"], v))
    scales = (nothing.to(SCALE_DTYPE), nothing.to(SCALE_DTYPE))
    without = (absent_k, absent_v, absent_k, absent_v, *scales, nothing.float())
    sk, sv, wk, wv, ks, vs, mass = (
        torch.empty_like(other if given[kind] is None else given[kind])
        for kind, other in zip((*STATE_KINDS, *SCALE_KINDS, MASS_KIND), without, strict=True)
    )
    # Families make one row of all heads by a view, which takes the strides that their own queries have.
    out = torch.empty_like(q) if q.shape[3] == v.shape[3] else _laid_out_by_token(q, v.shape[3])
    return out, sk, sv, wk, wv, ks, vs, mass


def _laid_out_by_token(q: torch.Tensor, value_dim: int) -> torch.Tensor:
    """Empty [B, Hq, T, Dv] whose heads of one token lie in a row."""
    batch, heads, num_tokens, _ = q.shape
    return q.new_empty(batch, num_tokens, heads, value_dim).transpose(1, 2)
