"""Sink attention over whole histories in torch: in float64 the oracle's, in 16 bits what PyTorch makes of it.

Vectorised, so that thousands of steps can be checked on a GPU; test_sink_attention_reference.py holds it against the
oracle of tests/reference/oracle.py.
"""

from __future__ import annotations

import dataclasses

import torch
from sinkrt.ring import TURN

QK_EPSILON = 0.01
"""Epsilon of norms of queries and keys: large, so that one left out is noticed."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What a launch receives besides tensors. dtype: of q, k, v. kv: ``fp | fp16 | int8``.

    value_dim: of values and outputs, 0: head_dim.
    rotation: ``none``, ``caller`` (q and k come rotated, queries are turned back by given cos and sin) or ``kernel``.
    gate_dim: 0 (no gate), 1 or head_dim.
    qk_norm: RMS norms of queries and keys before the rotation. norm_of_rows: they are of all heads of a token.
    v_norm: RMS norms of values. turned_weights: weights of queries and keys after the rotation, 0, 1 (queries) or 2.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    num_sinks: int
    window_size: int
    dtype: torch.dtype
    kv: str = "fp"
    rotation: str = "none"
    rotary_dim: int = 0
    interleaved: bool = False
    rope_scaling: float = 1.0
    softcap: float = 0.0
    alibi: bool = False
    sink_logit: bool = False
    sink_scale: bool = False
    gate_dim: int = 0
    batch: int = 3
    value_dim: int = 0
    qk_norm: bool = False
    norm_of_rows: bool = False
    v_norm: bool = False
    turned_weights: int = 0

    @property
    def value_size(self) -> int:
        return self.value_dim or self.head_dim

    @property
    def capacity(self) -> int:
        return self.num_sinks + self.window_size

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    def __str__(self) -> str:
        names = ("softcap", "alibi", "sink_logit", "sink_scale", "interleaved", "qk_norm", "norm_of_rows", "v_norm")
        extras = [name for name in names if getattr(self, name)]
        extras += [f"gate{self.gate_dim}"] if self.gate_dim else []
        extras += [f"Dv{self.value_dim}"] if self.value_dim else []
        extras += [f"turned{self.turned_weights}"] if self.turned_weights else []
        return "-".join(
            (
                f"Hq{self.num_q_heads}-Hkv{self.num_kv_heads}-D{self.head_dim}-S{self.num_sinks}-W{self.window_size}",
                str(self.dtype).removeprefix("torch."),
                self.kv,
                f"B{self.batch}",
                self.rotation,
                *extras,
            )
        )


@dataclasses.dataclass
class Tokens:
    """N tokens of B streams. q: [B, Hq, N, D], k, v: [B, Hkv, N, D], of the case's dtype, rotated if callers do that.

    positions: int64 [B, N]: 0 .. S-1, then any ones without gaps. frequency: int64 [R/2], turns a token by 2^-32.
    gate: [B, Hq, N, gate_dim]. Per head float32 [Hq]: slopes, sink_logit, sink_scale. Norms [D], or of
    all heads [H * D]: q_norm, k_norm; [Dv]: v_norm. After the rotation [D]: q_turned, k_turned.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    frequency: torch.Tensor
    gate: torch.Tensor | None
    slopes: torch.Tensor | None
    sink_logit: torch.Tensor | None
    sink_scale: torch.Tensor | None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    v_norm: torch.Tensor | None = None
    q_turned: torch.Tensor | None = None
    k_turned: torch.Tensor | None = None

    @classmethod
    def random(cls, case: Case, positions: torch.Tensor) -> Tokens:
        """Fresh ones on the device of `positions`, with logits that spread over several units."""
        device, (batch, count) = positions.device, positions.shape

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device).to(case.dtype)

        def weight(size: int, wanted: bool) -> torch.Tensor | None:
            return torch.rand(size, device=device) + 0.5 if wanted else None

        heads = (case.num_q_heads, case.num_kv_heads) if case.norm_of_rows else (1, 1)
        base = 10000.0 ** (-torch.arange(0, case.rotary_dim, 2, dtype=torch.float64) / max(case.rotary_dim, 1))
        return cls(
            q=normal(batch, case.num_q_heads, count, case.head_dim) * 1.5,
            k=normal(batch, case.num_kv_heads, count, case.head_dim) * 1.5,
            v=normal(batch, case.num_kv_heads, count, case.value_size),
            positions=positions,
            frequency=(base / (2 * torch.pi) * TURN).round().long().to(device),
            gate=normal(batch, case.num_q_heads, count, case.gate_dim) if case.gate_dim else None,
            slopes=torch.rand(case.num_q_heads, device=device) if case.alibi else None,
            sink_logit=torch.randn(case.num_q_heads, device=device) * 3 if case.sink_logit else None,
            sink_scale=torch.rand(case.num_q_heads, device=device) * 3 if case.sink_scale else None,
            q_norm=weight(heads[0] * case.head_dim, case.qk_norm),
            k_norm=weight(heads[1] * case.head_dim, case.qk_norm),
            v_norm=weight(case.value_size, case.v_norm),
            q_turned=weight(case.head_dim, case.turned_weights > 0),
            k_turned=weight(case.head_dim, case.turned_weights > 1),
        )

    def shift(self, case: Case) -> torch.Tensor:
        """int64 [B, N]: tokens by which queries are turned back for the sinks."""
        return (self.positions - (case.capacity - 1)).clamp(min=0)


def angles(positions: torch.Tensor, frequency: torch.Tensor) -> torch.Tensor:
    """float64 [.., R/2] in [-pi, pi), from exact phases. positions: int64 [..], frequency: int64 [R/2]."""
    phase = (positions[..., None] % TURN * frequency) % TURN  # products below 2^64 wrap, which 2^32 divides
    return ((phase + TURN // 2) % TURN - TURN // 2).double() * (2 * torch.pi / TURN)


def turned(x: torch.Tensor, angle: torch.Tensor, case: Case, scaling: float = 1.0) -> torch.Tensor:
    """x [B, H, N, D] with its leading dimensions turned by angle float64 [B, N, R/2]; float64."""
    x, half = x.double(), angle.shape[-1]
    if not half:
        return x
    cos, sin = angle.cos()[:, None] * scaling, angle.sin()[:, None] * scaling
    head, rest = x[..., : 2 * half], x[..., 2 * half :]
    first, second = (head[..., ::2], head[..., 1::2]) if case.interleaved else (head[..., :half], head[..., half:])
    pair = (first * cos - second * sin, second * cos + first * sin)
    head = torch.stack(pair, -1).flatten(-2) if case.interleaved else torch.cat(pair, -1)
    return torch.cat((head, rest), -1)


def normed(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Rows of x [B, H, N, D] by their RMS norm in float64, or all heads of a token by theirs where the weight is of
    all of them; x itself without a weight."""
    if weight is None:
        return x
    x = x.double()
    if len(weight) > x.shape[-1]:
        rows = x.transpose(1, 2).flatten(2)
        return normed_rows(rows, weight).unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)
    return normed_rows(x, weight)


def normed_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """float64 x [.., D] by the RMS norm of the last axis."""
    return x / (x.square().mean(-1, keepdim=True) + QK_EPSILON).sqrt() * weight.double()


def as_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries and scales [..] of rows x [.., D], in float64: tests/reference/oracle.py's Int8Row."""
    scale = (x.abs().amax(-1) / 127).clamp(2.0**-17, 65504.0).half().double()
    return (x / scale[..., None]).round().clamp(-127, 127), scale


def stored_rows(case: Case, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v [B, Hkv, N, D] in float64 as states hold floating-point rows: keys rotated."""
    k = normed(tokens.k, tokens.k_norm).double()
    if case.rotation == "kernel":
        k = turned(k, angles(tokens.positions, tokens.frequency), case, case.rope_scaling)
    return k, normed(tokens.v, tokens.v_norm).double()


def attention(case: Case, tokens: Tokens, dtype: torch.dtype, queries: slice = slice(None)) -> torch.Tensor:
    """Outputs [B, Hq, n, D] of the tokens that `queries` selects, computed in `dtype`.

    In 16 bits: what modelling code does, with a float32 softmax; rotations are computed in float64 and rounded once.
    """
    k, v = stored_rows(case, tokens)
    is_sink = torch.arange(k.shape[2], device=k.device) < case.num_sinks  # of keys, [N]
    if case.kv == "int8":
        (k_int8, k_scale), (v_int8, v_scale) = as_int8(k), as_int8(v)
        k = torch.where(is_sink[:, None], k, k_int8 * k_scale[..., None])
        v = torch.where(is_sink[:, None], v, v_int8 * v_scale[..., None])
    if case.kv == "fp16":
        k, v = (torch.where(is_sink[:, None], x, x.half().double()) for x in (k, v))
    q = normed(tokens.q[:, :, queries], tokens.q_norm)
    positions, shift = tokens.positions[:, queries], tokens.shift(case)[:, queries]
    if case.rotation == "kernel":
        q_window = turned(q, angles(positions, tokens.frequency), case, case.rope_scaling)
        q_sink = turned(q, angles(positions - shift, tokens.frequency), case, case.rope_scaling)
        if tokens.q_turned is not None:
            q_sink = q_sink * tokens.q_turned.double()
            q_sink = q_sink if tokens.k_turned is None else q_sink * tokens.k_turned.double()
            q_window = turned(q_sink, angles(shift, tokens.frequency), case)
    else:
        q_window, q_sink = q.double(), q.double()
        if case.rotation == "caller":
            q_sink = turned(q, -angles(shift, tokens.frequency), case)
    group = case.num_q_heads // case.num_kv_heads
    k, v = (x.to(dtype).repeat_interleave(group, dim=1) for x in (k, v))
    logits = torch.where(is_sink, q_sink.to(dtype) @ k.mT, q_window.to(dtype) @ k.mT) * case.scale  # [B, Hq, n, N]
    if case.softcap:
        logits = torch.tanh(logits / case.softcap) * case.softcap

    index = torch.arange(k.shape[2], device=k.device)
    age = index[queries][:, None] - index  # [n, N]; index counts tokens, positions may jump after the sinks
    if tokens.slopes is not None:
        at_most = positions.clamp(max=case.capacity - 1)[:, :, None]  # in-cache position of the query
        distance = torch.where(is_sink, index - at_most, -age)  # [B, n, N]
        logits = logits + (tokens.slopes.double()[:, None, None] * distance[:, None]).to(dtype)
    if tokens.sink_scale is not None:
        factor = tokens.sink_scale.double().log().to(dtype)[:, None, None]
        logits = torch.cat((logits[..., :1] + factor, logits[..., 1:]), -1)
    is_seen = (age >= 0) & (is_sink | (age < case.window_size))
    logits = logits.masked_fill(~is_seen, float("-inf"))
    if tokens.sink_logit is not None:
        extra = tokens.sink_logit.to(dtype)[:, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat((logits, extra), -1)
    weights = logits.softmax(-1, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)[..., : k.shape[2]]
    out = weights @ v
    if tokens.gate is not None:
        out = out * tokens.gate[:, :, queries].to(dtype).sigmoid()
    return out
