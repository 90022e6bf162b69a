"""Recurrences by chunks against naive float64 loops over tokens, and against transformers' own modules."""

from __future__ import annotations

import pytest
import torch
from sinkexport.recurrent.delta_rule import DecayMasks
from sinkexport.recurrent.kda import ChannelMasks, kimi_delta_attention
from sinkexport.recurrent.lightning import lightning_attention
from sinkexport.recurrent.mlstm import mlstm
from sinkexport.recurrent.rwkv import wkv
from sinkexport.recurrent.scan import linear_scan
from transformers.models.glm5_next.modeling_glm5_next import recurrent_kimi_delta_attention
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu
from transformers.models.xlstm.modeling_xlstm import mlstm_recurrent_sequence_native

BATCH, HEADS, KEY_DIM, VALUE_DIM = 2, 3, 8, 5
NUM_TOKENS = [1, 2, 3, 16, 61, 64, 256]
STRENGTHS = [0.01, 1.0, 60.0]
"""Factors on decays: hardly any, ordinary, and such that a product of two underflows."""


class Normal:
    """Draws float64 tensors."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 2e-6) -> None:
    """Compare on the scale of what is wanted."""
    assert got.dtype == torch.float32
    assert float((got.double() - want).norm() / want.norm().clamp(min=1e-30)) < tolerance


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_linear_scan(num_tokens: int, strength: float) -> None:
    normal = Normal(num_tokens)
    decay = torch.exp(-strength * normal(BATCH, num_tokens, 7).exp())
    inputs, state = normal(BATCH, num_tokens, 7), normal(BATCH, 7)
    wanted, h = [], state
    for t in range(num_tokens):
        h = decay[:, t] * h + inputs[:, t]
        wanted.append(h)
    assert_close(linear_scan(decay.float(), inputs.float(), state.float()), torch.stack(wanted, dim=1))


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_lightning_attention(num_tokens: int, strength: float) -> None:
    normal = Normal(num_tokens)
    query, key = normal(BATCH, HEADS, num_tokens, KEY_DIM), normal(BATCH, HEADS, num_tokens, KEY_DIM)
    value, state = normal(BATCH, HEADS, num_tokens, VALUE_DIM), normal(BATCH, HEADS, KEY_DIM, VALUE_DIM)
    decay = (-strength * normal(1, HEADS, 1).exp()).expand(1, HEADS, num_tokens)
    given = [x.float() for x in (query, key, value, decay, state)]
    outputs = []
    for t in range(num_tokens):
        state = decay[..., t, None, None].exp() * state + key[:, :, t, :, None] * value[:, :, t, None]
        outputs.append((query[:, :, t, :, None] * state).sum(dim=-2))
    out, after = lightning_attention(*given, DecayMasks(num_tokens))
    assert_close(out, torch.stack(outputs, dim=2))
    assert_close(after, state)


def delta_arguments(num_tokens: int, strength: float) -> dict[str, torch.Tensor]:
    normal = Normal(num_tokens)
    return {
        "query": normal(BATCH, num_tokens, HEADS, KEY_DIM),
        "key": normal(BATCH, num_tokens, HEADS, KEY_DIM),
        "value": normal(BATCH, num_tokens, HEADS, VALUE_DIM),
        "g": -strength * normal(BATCH, num_tokens, HEADS, KEY_DIM).exp(),
        "beta": torch.sigmoid(normal(BATCH, num_tokens, HEADS)),
        "initial_state": normal(BATCH, HEADS, KEY_DIM, VALUE_DIM),
    }


def delta_by_steps(given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    query, key = (
        given[name] / given[name].square().sum(-1, keepdim=True).add(1e-6).sqrt() for name in ("query", "key")
    )
    state, outputs = given["initial_state"], []
    for t in range(query.shape[1]):
        state = state * given["g"][:, t, :, :, None].exp()
        seen = torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        written = given["beta"][:, t, :, None] * (given["value"][:, t] - seen)
        state = state + key[:, t, :, :, None] * written[:, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]) * KEY_DIM**-0.5)
    return torch.stack(outputs, dim=1), state


@pytest.mark.parametrize("kind", [*STRENGTHS, "equal"])
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_kimi_delta_attention(num_tokens: int, kind: float | str) -> None:
    """At most twice as far from float64 as transformers' loop over tokens in float32, or 2e-6.

    ``equal``: one key all along, written with rate 1 and never forgotten, which is the least stable system.
    """
    given = delta_arguments(num_tokens, 1.0 if kind == "equal" else float(kind))
    if kind == "equal":
        given["key"] = given["key"][:, :1].expand_as(given["key"])
        given["g"], given["beta"] = 0.0 * given["g"], torch.ones_like(given["beta"])
    single = {name: x.float() for name, x in given.items()}
    more = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
    got = kimi_delta_attention(**single, masks=ChannelMasks(num_tokens), **more)
    loop = recurrent_kimi_delta_attention(**single, **more)
    for have, theirs, want in zip(got, loop, delta_by_steps(given), strict=True):
        assert_close(have, want, max(2e-6, 2 * float((theirs - want).norm() / want.norm())))


def test_kimi_delta_attention_skips_what_is_no_token_to_the_bit() -> None:
    given = {name: x.float() for name, x in delta_arguments(9, 1.0).items()}
    valid = torch.tensor([4, 0])
    counts = (torch.arange(9) < valid[:, None])[..., None]
    given["g"], given["beta"] = given["g"] * counts[..., None], given["beta"] * counts
    _, after = kimi_delta_attention(**given, masks=ChannelMasks(9))
    assert torch.equal(after[1], given["initial_state"][1])
    first = {name: x if name == "initial_state" else x[:, :4] for name, x in given.items()}
    _, wanted = kimi_delta_attention(**first, masks=ChannelMasks(4))
    torch.testing.assert_close(after[0], wanted[0])


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("strength", [*STRENGTHS, 3000.0])
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_wkv(num_tokens: int, strength: float, begins: bool) -> None:
    """Against float64, and against transformers' function from its own beginning, a scale of -1e38."""
    normal, size = Normal(num_tokens), 7
    log_decay, bonus = -strength * normal(size).exp(), normal(size)
    key, value = 20 * normal(BATCH, num_tokens, size), normal(BATCH, num_tokens, size)
    if begins:
        key[:, 0] = -300.0  # the first token's weight underflows
    states = (normal(BATCH, size), 1 + normal(BATCH, size).abs(), 10 * normal(BATCH, size))
    numerator, denominator = (x * states[2].exp() for x in states[:2])
    if begins:
        states, numerator, denominator = tuple(torch.zeros_like(x) for x in states), *(0 * x for x in states[:2])
    outputs = []
    for t in range(num_tokens):
        own = (key[:, t] + bonus).exp()
        outputs.append((numerator + own * value[:, t]) / (denominator + own))
        numerator = log_decay.exp() * numerator + key[:, t].exp() * value[:, t]
        denominator = log_decay.exp() * denominator + key[:, t].exp()
    everything = torch.ones(BATCH, num_tokens, dtype=torch.bool)
    single = [x.float() for x in (log_decay, bonus, key, value)]
    out, after = wkv(*single, tuple(x.float() for x in states), everything)
    assert_close(out, torch.stack(outputs, dim=1), 2e-5)
    theirs = [states[0], states[1], torch.full_like(states[2], -1e38) if begins else states[2]]
    time_decay = (-log_decay).log()
    own, ended = rwkv_linear_attention_cpu(
        time_decay.float(), *single[1:], state=[x.float() for x in theirs], return_state=True
    )
    torch.testing.assert_close(out, own, rtol=1e-3, atol=1e-4)
    for have, want in zip(after, ended, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-4)


def test_wkv_skips_what_is_no_token_to_the_bit() -> None:
    normal = Normal(0)
    key, value = (normal(3, 9, 7).float() for _ in range(2))
    states = tuple(normal(3, 7).abs().float() for _ in range(3))
    states[1][2] = states[0][2] = states[2][2] = 0.0
    decay, bonus = -normal(7).exp().float(), normal(7).float()
    is_token = torch.arange(9) < torch.tensor([4, 0, 0])[:, None]
    _, after = wkv(decay, bonus, key, value, states, is_token)
    _, wanted = wkv(decay, bonus, key[:, :4], value[:, :4], states, is_token[:, :4])
    for have, want, was in zip(after, wanted, states, strict=True):
        assert torch.equal(have[1:], was[1:])
        torch.testing.assert_close(have[0], want[0])


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_mlstm(num_tokens: int, strength: float, begins: bool) -> None:
    """Against transformers' loop over tokens in float64."""
    normal = Normal(num_tokens)
    query, key = (normal(BATCH, HEADS, num_tokens, KEY_DIM) for _ in range(2))
    value = normal(BATCH, HEADS, num_tokens, VALUE_DIM)
    input_gate, forget_gate = strength * normal(BATCH, HEADS, num_tokens), strength * normal(BATCH, HEADS, num_tokens)
    states = normal(BATCH, HEADS, KEY_DIM, VALUE_DIM), normal(BATCH, HEADS, KEY_DIM), normal(BATCH, HEADS, 1)
    if begins:
        states = tuple(torch.zeros_like(x) for x in states)
    wanted = mlstm_recurrent_sequence_native(
        query, key, value, input_gate, forget_gate, *states, return_last_states=True, dtype_state=torch.float64
    )
    given = [x.float() for x in (query, key, value, input_gate, forget_gate)]
    everything = torch.ones(BATCH, num_tokens, dtype=torch.bool)
    out, after = mlstm(*given, tuple(x.float() for x in states), everything, DecayMasks(num_tokens), 1e-6)
    assert_close(out, wanted[0], 5e-5)
    for have, want in zip(after, wanted[1], strict=True):
        assert_close(have, want, 2e-5)


def test_mlstm_skips_what_is_no_token_to_the_bit() -> None:
    normal = Normal(0)
    query, key, value = (normal(2, HEADS, 9, KEY_DIM).float() for _ in range(3))
    gates = [normal(2, HEADS, 9).float() for _ in range(2)]
    states = tuple(
        normal(*shape).float() for shape in ((2, HEADS, KEY_DIM, KEY_DIM), (2, HEADS, KEY_DIM), (2, HEADS, 1))
    )
    is_token = torch.arange(9) < torch.tensor([4, 0])[:, None]
    _, after = mlstm(query, key, value, *gates, states, is_token, DecayMasks(9), 1e-6)
    shorter = [x[:, :, :4] for x in (query, key, value, *gates)]
    _, wanted = mlstm(*shorter, states, is_token[:, :4], DecayMasks(4), 1e-6)
    for have, want, was in zip(after, wanted, states, strict=True):
        assert torch.equal(have[1], was[1])
        torch.testing.assert_close(have[0], want[0])
