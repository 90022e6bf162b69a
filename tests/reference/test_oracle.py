"""The oracle against dense attention, against evict-then-rotate and against the shift-the-query identity."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from tests.reference.oracle import Act, Array, SinkAttentionOracle, affine_factors

B, D = 2, 16
HEADS = ((1, 1), (6, 2), (4, 4))  # (Hq, Hkv): one head, groups of three, no groups
GEOMETRIES = ((0, 1), (0, 5), (1, 1), (4, 7), (3, 12))  # (S, W)
ROTATIONS: tuple[dict[str, Any], ...] = (
    {"rotary_dim": 16, "interleaved": False},
    {"rotary_dim": 16, "interleaved": True},
    {"rotary_dim": 4, "interleaved": False, "attention_scaling": 1.3},
    {"rotary_dim": 8, "interleaved": True, "softcap": 3.0},
    {"rotary_dim": 0, "interleaved": False, "scale": 0.4},
)


def frequencies(rotary_dim: int) -> Array:
    """[R/2], steep enough for every pair to turn noticeably within a few dozen tokens."""
    return 50.0 ** (-np.arange(0, rotary_dim, 2) / max(rotary_dim, 1))


def make(num_sink_tokens: int, window_size: int, rotation: dict[str, Any]) -> SinkAttentionOracle:
    rest = {key: value for key, value in rotation.items() if key != "rotary_dim"}
    return SinkAttentionOracle(
        batch=B,
        num_sink_tokens=num_sink_tokens,
        window_size=window_size,
        inv_freq=frequencies(rotation["rotary_dim"]),
        **rest,
    )


def random_stream(heads: tuple[int, int], steps: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """q [N, B, Hq, D], k and v [N, B, Hkv, D]."""
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(0, 1.5, (steps, B, h, D)) for h in (heads[0], heads[1], heads[1]))  # type: ignore[return-value]


def turn(x: torch.Tensor, angles: torch.Tensor, rotation: dict[str, Any]) -> torch.Tensor:
    """RoPE by complex multiplication, unlike the oracle's: x [..., D], angles [..., R/2]."""
    rotary_dim = rotation["rotary_dim"]
    if not rotary_dim:
        return x
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if rotation["interleaved"]:
        pairs = torch.view_as_complex(turned.unflatten(-1, (-1, 2)).contiguous())
    else:
        pairs = torch.complex(*turned.chunk(2, dim=-1))
    pairs = pairs * torch.polar(torch.full_like(angles, rotation.get("attention_scaling", 1.0)), angles)
    if rotation["interleaved"]:
        turned = torch.view_as_real(pairs).flatten(-2)
    else:
        turned = torch.cat((pairs.real, pairs.imag), dim=-1)
    return torch.cat((turned, rest), dim=-1)


def capped(logits: torch.Tensor, rotation: dict[str, Any]) -> torch.Tensor:
    softcap = rotation.get("softcap")
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def scale_of(rotation: dict[str, Any]) -> float:
    return float(rotation.get("scale", D**-0.5))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("rotation", ROTATIONS, ids=str)
def test_before_the_window_fills_it_is_dense_causal_attention(heads: tuple[int, int], rotation: dict[str, Any]) -> None:
    num_sink_tokens, window_size = 3, 12
    steps = num_sink_tokens + window_size
    stream = random_stream(heads, steps)
    oracle = make(num_sink_tokens, window_size, rotation)
    got = np.stack([oracle.step(*token) for token in zip(*stream, strict=True)])  # [N, B, Hq, D]

    q, k, v = (torch.from_numpy(x).permute(1, 2, 0, 3) for x in stream)  # [B, H, N, D]
    angles = torch.arange(steps, dtype=torch.float64)[:, None] * torch.from_numpy(frequencies(rotation["rotary_dim"]))
    q, k = turn(q, angles, rotation), turn(k, angles, rotation)
    if rotation.get("softcap"):
        logits = capped(q @ k.repeat_interleave(heads[0] // heads[1], 1).mT * scale_of(rotation), rotation)
        future = torch.ones(steps, steps, dtype=torch.bool).triu(1)
        weights = logits.masked_fill(future, float("-inf")).softmax(-1)
        want = weights @ v.repeat_interleave(heads[0] // heads[1], 1)
    else:
        want = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale_of(rotation), enable_gqa=True
        )
    np.testing.assert_allclose(got, want.permute(2, 0, 1, 3).numpy(), rtol=0, atol=1e-12)


def evict_then_rotate(
    num_sink_tokens: int, window_size: int, stream: tuple[Array, Array, Array], rotation: dict[str, Any]
) -> Array:
    """A cache that holds C tokens: throw out the oldest that is no sink, append, rotate all by place."""
    capacity = num_sink_tokens + window_size
    inv_freq = torch.from_numpy(frequencies(rotation["rotary_dim"]))
    keys = values = torch.zeros(B, stream[1].shape[2], 0, D, dtype=torch.float64)
    out = []
    for q, k, v in zip(*(torch.from_numpy(x)[:, :, :, None] for x in stream), strict=True):
        if keys.shape[2] == capacity:
            keys, values = (
                torch.cat((x[:, :, :num_sink_tokens], x[:, :, num_sink_tokens + 1 :]), dim=2) for x in (keys, values)
            )
        keys, values = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
        angles = torch.arange(keys.shape[2], dtype=torch.float64)[:, None] * inv_freq  # [n, R/2]
        turned_q, turned_k = turn(q, angles[-1:], rotation), turn(keys, angles, rotation)
        group = q.shape[1] // k.shape[1]
        logits = turned_q @ turned_k.repeat_interleave(group, 1).mT * scale_of(rotation)  # [B, Hq, 1, n]
        weights = capped(logits, rotation).softmax(-1)
        out.append((weights @ values.repeat_interleave(group, 1))[:, :, 0])
    result: Array = torch.stack(out).numpy()
    return result


def shift_the_query(
    num_sink_tokens: int, window_size: int, stream: tuple[Array, Array, Array], rotation: dict[str, Any]
) -> Array:
    """The identity that exported graphs rest on: keys rotated once, the query turned back for the sinks."""
    inv_freq = torch.from_numpy(frequencies(rotation["rotary_dim"]))
    unscaled = {**rotation, "attention_scaling": 1.0}
    heads_kv = stream[1].shape[2]
    sink_k, sink_v = (torch.zeros(B, heads_kv, num_sink_tokens, D, dtype=torch.float64) for _ in range(2))
    window_k, window_v = (torch.zeros(B, heads_kv, window_size, D, dtype=torch.float64) for _ in range(2))
    out = []
    for t, (q, k, v) in enumerate(zip(*(torch.from_numpy(x)[:, :, :, None] for x in stream), strict=True)):
        q, k = turn(q, t * inv_freq, rotation), turn(k, t * inv_freq, rotation)
        if t < num_sink_tokens:
            sink_k[:, :, t], sink_v[:, :, t] = k[:, :, 0], v[:, :, 0]
        slot = (t - num_sink_tokens) % window_size
        window_k[:, :, slot], window_v[:, :, slot] = k[:, :, 0], v[:, :, 0]
        shift = max(0, t - (num_sink_tokens + window_size - 1))
        q_sink = turn(q, -shift * inv_freq, unscaled)
        group = q.shape[1] // heads_kv
        logits = torch.cat(
            (q_sink @ sink_k.repeat_interleave(group, 1).mT, q @ window_k.repeat_interleave(group, 1).mT), dim=-1
        )
        there = torch.cat(
            (torch.arange(num_sink_tokens) <= t, torch.arange(window_size) < max(0, t - num_sink_tokens + 1))
        )
        logits = capped(logits * scale_of(rotation), rotation).masked_fill(~there, float("-inf"))
        values = torch.cat((sink_v, window_v), dim=2).repeat_interleave(group, 1)
        out.append((logits.softmax(-1) @ values)[:, :, 0])
    result: Array = torch.stack(out).numpy()
    return result


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"S{g[0]}-W{g[1]}")
@pytest.mark.parametrize(("heads", "rotation"), itertools.product(HEADS, ROTATIONS), ids=str)
def test_streaming(geometry: tuple[int, int], heads: tuple[int, int], rotation: dict[str, Any]) -> None:
    stream = random_stream(heads, 3 * sum(geometry) + 7)
    oracle = make(*geometry, rotation)
    got = np.stack([oracle.step(*token) for token in zip(*stream, strict=True)])
    np.testing.assert_allclose(got, evict_then_rotate(*geometry, stream, rotation), rtol=0, atol=1e-12)
    np.testing.assert_allclose(got, shift_the_query(*geometry, stream, rotation), rtol=0, atol=1e-10)


def test_the_comparison_is_sensitive() -> None:
    """A wrong pairing, a frequency off by 1% and a window one token short each move the result far beyond 1e-10."""
    stream = random_stream((6, 2), 40)
    rotation = ROTATIONS[0]
    want = evict_then_rotate(4, 7, stream, rotation)

    def distance(oracle: SinkAttentionOracle) -> float:
        return float(np.abs(np.stack([oracle.step(*token) for token in zip(*stream, strict=True)]) - want).max())

    assert distance(make(4, 7, rotation)) < 1e-12
    assert distance(make(4, 7, {**rotation, "interleaved": True})) > 1e-3
    assert distance(make(4, 6, rotation)) > 1e-3
    assert distance(make(3, 8, rotation)) > 1e-3
    off = make(4, 7, rotation)
    off.inv_freq = off.inv_freq * 1.01
    assert distance(off) > 1e-3


def test_far_streams_depend_on_cached_tokens_only() -> None:
    """Sinks and the last W tokens are enough to go on from any position."""
    q, k, v = random_stream((6, 2), 60)
    long = make(4, 7, ROTATIONS[1])
    want = [long.step(*token) for token in zip(q, k, v, strict=True)]
    short = make(4, 7, ROTATIONS[1])
    picked = [*range(4), *range(60 - 7 - 3, 60)]
    got = [short.step(q[t], k[t], v[t]) for t in picked]
    for late in (-1, -2, -3, -4):
        np.testing.assert_array_equal(got[late], want[late])
    assert np.abs(got[-5] - want[-5]).max() > 1e-3  # one token earlier its window was not complete


def test_streams_are_independent_and_may_be_at_different_positions() -> None:
    q, k, v = random_stream((6, 2), 30)
    together = make(3, 5, ROTATIONS[0])
    alone = SinkAttentionOracle(batch=1, num_sink_tokens=3, window_size=5, inv_freq=frequencies(16))
    for t in range(12):  # stream 0 runs ahead
        together.step_stream(0, q[t, 0], k[t, 0], v[t, 0])
    for t in range(18):
        got = together.step(
            np.stack((q[12 + t, 0], q[t, 1])), np.stack((k[12 + t, 0], k[t, 1])), np.stack((v[12 + t, 0], v[t, 1]))
        )
        np.testing.assert_array_equal(got[1], alone.step_stream(0, q[t, 1], k[t, 1], v[t, 1]))


@pytest.mark.parametrize(
    "names",
    [
        ("alibi_slopes",),
        ("sink_logit",),
        ("sink_scale",),
        ("gate1",),
        ("gateD",),
        ("alibi_slopes", "sink_logit", "sink_scale", "gateD"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("geometry", [(1, 1), (4, 7)], ids=lambda g: f"S{g[0]}-W{g[1]}")
def test_extras_as_biases_and_keys_of_torch_sdpa(names: tuple[str, ...], geometry: tuple[int, int]) -> None:
    """ALiBi and sink_scale are additive biases, sink_logit is a key of zeros with a bias and a value of zeros."""
    heads, steps = (6, 2), 3 * sum(geometry) + 7
    q, k, v = random_stream(heads, steps)
    rng = np.random.default_rng(1)
    per_head: dict[str, Any] = {
        "alibi_slopes": rng.uniform(0, 0.5, heads[0]),
        "sink_logit": rng.normal(0, 3, heads[0]),
        "sink_scale": rng.uniform(0, 3, heads[0]),
    }
    per_head = {name: values for name, values in per_head.items() if name in names}
    gate_dim = 1 if "gate1" in names else D if "gateD" in names else 0
    gates = rng.normal(0, 2, (steps, B, heads[0], gate_dim)) if gate_dim else [None] * steps
    num_sinks, window = geometry
    oracle = SinkAttentionOracle(batch=B, num_sink_tokens=num_sinks, window_size=window, **per_head)
    cached: list[int] = []
    for t in range(steps):
        got = oracle.step(q[t], k[t], v[t], gates[t])
        if len(cached) == num_sinks + window:
            del cached[num_sinks]
        cached.append(t)
        n = len(cached)
        bias = torch.zeros(heads[0], 1, n + 1, dtype=torch.float64)
        bias[:, :, n] = torch.from_numpy(per_head.get("sink_logit", np.full(heads[0], -np.inf)))[:, None]
        if "alibi_slopes" in per_head:
            bias[:, 0, :n] += torch.from_numpy(per_head["alibi_slopes"])[:, None] * (torch.arange(n) - n + 1)
        if "sink_scale" in per_head:
            bias[:, 0, 0] += torch.from_numpy(per_head["sink_scale"]).log()
        keys, values = (
            torch.nn.functional.pad(torch.from_numpy(x[cached]).permute(1, 2, 0, 3), (0, 0, 0, 1)) for x in (k, v)
        )
        want = torch.nn.functional.scaled_dot_product_attention(
            torch.from_numpy(q[t])[:, :, None], keys, values, attn_mask=bias, scale=D**-0.5, enable_gqa=True
        )[:, :, 0]
        if gate_dim:
            want = want * torch.from_numpy(gates[t]).sigmoid()
        np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("geometry", [(0, 3), (4, 7)], ids=lambda g: f"S{g[0]}-W{g[1]}")
def test_affine_is_scaled_attention_and_the_mean_of_the_cached_values(geometry: tuple[int, int]) -> None:
    heads, steps = (6, 2), 3 * sum(geometry) + 7
    q, k, v = random_stream(heads, steps)
    affine = np.random.default_rng(2).normal(0, 2, (steps, B, heads[0], 2))
    logit = np.linspace(-2, 2, heads[0])
    extras: dict[str, Any] = {"inv_freq": frequencies(D), "sink_logit": logit}
    oracle, plain = (
        SinkAttentionOracle(batch=B, num_sink_tokens=geometry[0], window_size=geometry[1], **extras) for _ in range(2)
    )
    cached: list[int] = []
    for t in range(steps):
        if len(cached) == sum(geometry):
            del cached[geometry[0]]
        cached.append(t)
        got, weighted = oracle.step(q[t], k[t], v[t], affine=affine[t]), plain.step(q[t], k[t], v[t])
        mean = np.repeat(v[cached].mean(axis=0), heads[0] // heads[1], axis=1)  # [B, Hq, D]
        want = affine[t, ..., :1] * weighted + affine[t, ..., 1:] * mean
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_affine_factors_in_numbers() -> None:
    x = np.array([2.0, -1.0])
    more: dict[str, Any] = {"num_q_heads": 2}
    np.testing.assert_array_equal(affine_factors(x, **more), [[1, 0], [1, 0]])
    weight = [[1.0, 0.0], [0.0, 3.0]]
    np.testing.assert_array_equal(affine_factors(x, scale_weight=weight, bias_bias=[4, 5], **more), [[3, 4], [-2, 5]])
    np.testing.assert_array_equal(affine_factors(x, scale_bias=[7, 8], bias_weight=weight, **more), [[7, 2], [8, -3]])
    clipped = affine_factors(x, scale_weight=weight, scale_average=[0.5, 0.25], activation="clip", **more)
    np.testing.assert_array_equal(clipped, [[1, -0.5], [0, 0.25]])
    gated = affine_factors(x, scale_bias=[0, np.log(3)], activation="sigmoid", **more)
    np.testing.assert_allclose(gated, [[0.5, 0], [0.75, 0]], atol=1e-15)


@pytest.mark.parametrize("extra", [{"sink_scale": [1.0]}, {"act": Act(5.0, 0.4, 1, [True])}], ids=str)
def test_sink_scale_and_act_need_a_sink(extra: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="num_sink_tokens >= 1"):
        SinkAttentionOracle(batch=1, num_sink_tokens=0, window_size=4, **extra)


def test_act_is_the_papers_where_its_threshold_is_not_near() -> None:
    """The whole matrix of weights, columns over the threshold times beta, what that frees to the others in proportion.

    As the paper has it, but that a column's mean is over the queries until the one that looks. Keys with a part that
    all queries share make later sinks beyond doubt: in a column means are below alpha / n or above 2 alpha / n.
    """
    steps, num_sinks, alpha, beta = 40, 2, 1.5, 0.4
    q, k, v = random_stream((2, 2), steps)
    k *= 0.05
    k[[0, 9, 23], ..., 0], q[..., 0] = 16.0, 1.5
    act = Act(alpha, beta, 1, (True, False))
    oracle, plain = (
        SinkAttentionOracle(batch=B, num_sink_tokens=num_sinks, window_size=steps, act=given) for given in (act, None)
    )
    found = 0
    for t in range(steps):
        got, without = oracle.step(q[t], k[t], v[t]), plain.step(q[t], k[t], v[t])
        np.testing.assert_array_equal(got[:, 1], without[:, 1])  # this head is not calibrated
        weights = np.exp(np.einsum("qbd,kbd->bqk", q[: t + 1, :, 0], k[: t + 1, :, 0]) * D**-0.5)
        weights = np.tril(weights) / np.tril(weights).sum(axis=-1, keepdims=True)  # [B, t + 1, t + 1]
        means = weights.sum(axis=1) / np.arange(t + 1, 0, -1) * (t + 1) / alpha
        is_sink = means > 1
        is_sink[:, :num_sinks] = False
        assert ((means < 1) | (means > 2) | ~is_sink).all()
        found += is_sink.sum()
        row = weights[:, -1]
        freed = (1 - beta) * (row * is_sink).sum(axis=-1, keepdims=True)
        others = row * ~is_sink
        want = np.where(is_sink, beta * row, others + freed * others / others.sum(axis=-1, keepdims=True))
        np.testing.assert_allclose(want.sum(axis=-1), 1.0)
        np.testing.assert_allclose(got[:, 0], np.einsum("bk,kbd->bd", want, v[: t + 1, :, 0]), rtol=0, atol=1e-12)
    assert found >= B * (steps - 9)
