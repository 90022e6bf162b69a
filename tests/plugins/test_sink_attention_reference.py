"""The vectorised reference that GPU tests use, against the float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sinkrt.ring import TURN

from tests.plugins.sink_attention_reference import QK_EPSILON, Case, Tokens, angles, attention, turned
from tests.reference.layers import rms_norm
from tests.reference.oracle import SinkAttentionOracle

CASES = [
    Case(6, 2, 16, 3, 5, torch.float64, rotation="kernel", rotary_dim=16),
    Case(6, 2, 16, 3, 5, torch.float64, kv="int8", rotation="kernel", rotary_dim=8, interleaved=True, rope_scaling=1.2),
    Case(4, 4, 16, 0, 5, torch.float64, kv="int8", rotation="kernel", rotary_dim=16, softcap=3.0, gate_dim=1),
    Case(7, 1, 16, 1, 1, torch.float64, rotation="none", alibi=True, sink_logit=True, sink_scale=True, gate_dim=16),
    Case(7, 1, 16, 4, 6, torch.float64, kv="int8", rotation="none", alibi=True, softcap=5.0, sink_scale=True),
    Case(3, 1, 16, 2, 6, torch.float64, rotation="kernel", rotary_dim=4, sink_logit=True),
    Case(4, 2, 16, 2, 6, torch.float64, kv="fp16", rotation="kernel", rotary_dim=16, value_dim=8),
    Case(4, 2, 16, 2, 6, torch.float64, kv="int8", rotation="kernel", rotary_dim=8, qk_norm=True),
]


def oracle_outputs(case: Case, tokens: Tokens) -> np.ndarray:
    """[B, Hq, N, D]."""
    per_head = {"alibi_slopes": tokens.slopes, "sink_logit": tokens.sink_logit, "sink_scale": tokens.sink_scale}
    oracle = SinkAttentionOracle(
        batch=case.batch,
        num_sink_tokens=case.num_sinks,
        window_size=case.window_size,
        inv_freq=tokens.frequency.numpy() * (2 * np.pi / TURN) if case.rotation == "kernel" else (),
        interleaved=case.interleaved,
        attention_scaling=case.rope_scaling,
        softcap=case.softcap,
        kv=case.kv,
        **{name: None if x is None else x.numpy() for name, x in per_head.items()},
    )
    q, k, v = (x.numpy() for x in (tokens.q, tokens.k, tokens.v))
    if tokens.q_norm is not None and tokens.k_norm is not None:
        q, k = rms_norm(q, tokens.q_norm.numpy(), QK_EPSILON), rms_norm(k, tokens.k_norm.numpy(), QK_EPSILON)
    gates = [None] * q.shape[2] if tokens.gate is None else [tokens.gate[:, :, i].numpy() for i in range(q.shape[2])]
    return np.stack([oracle.step(q[:, :, i], k[:, :, i], v[:, :, i], gates[i]) for i in range(q.shape[2])], axis=2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_oracle(case: Case) -> None:
    steps = 3 * case.capacity + 7
    positions = torch.arange(steps).expand(case.batch, -1)
    tokens = Tokens.random(case, positions)
    want = oracle_outputs(case, tokens)
    np.testing.assert_allclose(attention(case, tokens, torch.float64).numpy(), want, rtol=0, atol=1e-9)
    last = attention(case, tokens, torch.float64, slice(steps - 1, steps)).numpy()
    np.testing.assert_allclose(last, want[:, :, -1:], rtol=0, atol=1e-9)


def test_keys_and_queries_that_come_rotated() -> None:
    case = Case(6, 2, 16, 3, 5, torch.float64, rotation="kernel", rotary_dim=8, interleaved=True)
    tokens = Tokens.random(case, torch.arange(40).expand(case.batch, -1))
    want = attention(case, tokens, torch.float64)
    angle = angles(tokens.positions, tokens.frequency)
    tokens.q, tokens.k = turned(tokens.q, angle, case), turned(tokens.k, angle, case)
    rotated = Case(6, 2, 16, 3, 5, torch.float64, rotation="caller", rotary_dim=8, interleaved=True)
    torch.testing.assert_close(attention(rotated, tokens, torch.float64), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kv", ["fp", "int8"])
def test_a_far_stream_is_a_near_one_whose_window_is_full(kv: str) -> None:
    """Phases at 2^45 are exact: only the place in the cache counts. (int8 rows round differently there.)"""
    near = Case(4, 2, 16, 3, 5, torch.float64, rotation="kernel", rotary_dim=16, alibi=True)
    tokens = Tokens.random(near, torch.arange(40).expand(near.batch, -1))
    want = attention(near, tokens, torch.float64)[:, :, 8:]
    tokens.positions = torch.cat((torch.arange(3), torch.arange(3, 40) + 2**45)).expand(near.batch, -1)
    far = Case(4, 2, 16, 3, 5, torch.float64, kv=kv, rotation="kernel", rotary_dim=16, alibi=True)
    tolerance = 1e-9 if kv == "fp" else 0.1
    torch.testing.assert_close(attention(far, tokens, torch.float64)[:, :, 8:], want, rtol=0, atol=tolerance)
