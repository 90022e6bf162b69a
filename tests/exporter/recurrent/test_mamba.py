"""Mamba and Mamba-2 by steps and in chunks, against naive loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from sinkexport.recurrent.delta_rule import DecayMasks
from sinkexport.recurrent.mamba1 import selective_scan
from sinkexport.recurrent.mamba2 import chunk_scan, step_lengths, step_scan

BATCH, HEADS, GROUPS, HEAD_DIM, SIZE, CHANNELS = 2, 6, 3, 4, 5, 7
DECAYS = {"any": 1.0, "forgetful": 80.0, "lasting": 1e-6}
"""Factors on the logarithms of decays."""

Tensors = dict[str, torch.Tensor]


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def mamba2_arguments(num_tokens: int, decay: float) -> Tensors:
    generator = torch.Generator().manual_seed(num_tokens)
    return {
        "x": normal(generator, BATCH, num_tokens, HEADS, HEAD_DIM),
        "length": normal(generator, BATCH, num_tokens, HEADS).exp(),
        "a": -decay * normal(generator, HEADS).exp(),
        "b": normal(generator, BATCH, num_tokens, GROUPS, SIZE),
        "c": normal(generator, BATCH, num_tokens, GROUPS, SIZE),
        "state": normal(generator, BATCH, HEADS, HEAD_DIM, SIZE),
    }


def mamba2_loop(x: torch.Tensor, length: torch.Tensor, a: torch.Tensor, **more: torch.Tensor) -> list[torch.Tensor]:
    """The recurrence as the paper has it, in float64."""
    b, c = (more[name].repeat_interleave(HEADS // GROUPS, dim=2) for name in ("b", "c"))
    state, outputs = more["state"], []
    for t in range(x.shape[1]):
        state = state * (length[:, t] * a).exp()[..., None, None]
        state = state + torch.einsum("bh,bhp,bhn->bhpn", length[:, t], x[:, t], b[:, t])
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, c[:, t]))
    return [torch.stack(outputs, dim=1), state]


def assert_close(got: tuple[torch.Tensor, ...], want: list[torch.Tensor]) -> None:
    for have, wanted in zip(got, want, strict=True):
        assert have.dtype == torch.float32
        assert float((have - wanted).norm() / wanted.norm()) < 2e-6


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 16, 61, 256])
def test_mamba2_chunks_follow_the_recurrence(num_tokens: int, decay: str) -> None:
    given = mamba2_arguments(num_tokens, DECAYS[decay])
    single = {name: value.float() for name, value in given.items()}
    assert_close(chunk_scan(**single, masks=DecayMasks(num_tokens)), mamba2_loop(**given))


@pytest.mark.parametrize("decay", DECAYS)
def test_mamba2_steps_follow_the_recurrence(decay: str) -> None:
    given = mamba2_arguments(1, DECAYS[decay])
    single = {name: value.float() for name, value in given.items()}
    token = {name: value if name in ("a", "state") else value[:, 0] for name, value in single.items()}
    out, after = step_scan(**token)
    assert_close((out[:, None], after), mamba2_loop(**given))


def test_mamba2_chunks_after_chunks_are_one_chunk() -> None:
    given = {name: value.float() for name, value in mamba2_arguments(48, 1.0).items()}
    whole = chunk_scan(**given, masks=DecayMasks(48))
    state, outputs = given.pop("state"), []
    for start in range(0, 48, 16):
        part = {name: v if name == "a" else v[:, start : start + 16] for name, v in given.items()}
        out, state = chunk_scan(**part, state=state, masks=DecayMasks(16))
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, whole[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limits", [(0.0, math.inf), (0.4, math.inf), (0.0, 0.9), (0.4, 0.9)])
def test_step_lengths_keep_the_limits_but_for_what_is_no_token(limits: tuple[float, float]) -> None:
    dt, bias = torch.linspace(-3, 3, 12).reshape(1, 4, 3), torch.tensor([0.1, -0.2, 0.3])
    is_token = torch.tensor([[True, True, False, True]])
    got = step_lengths(dt, bias, limits, is_token)
    want = torch.nn.functional.softplus(dt + bias).clamp(*limits)
    torch.testing.assert_close(got[:, [0, 1, 3]], want[:, [0, 1, 3]])
    assert not got[:, 2].any()


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_what_is_no_token_changes_no_state_to_the_bit(num_tokens: int) -> None:
    counts = torch.arange(num_tokens) < 0
    given = {name: value.float() for name, value in mamba2_arguments(num_tokens, 1.0).items()}
    given["length"] = given["length"] * counts[:, None]
    _, after = chunk_scan(**given, masks=DecayMasks(num_tokens))
    assert torch.equal(after, given["state"])
    one = {name: value.float() for name, value in mamba1_arguments(num_tokens, 1.0).items()}
    one["length"] = one["length"] * counts[:, None]
    _, after = selective_scan(**one)
    assert torch.equal(after, one["state"])


def mamba1_arguments(num_tokens: int, decay: float) -> Tensors:
    generator = torch.Generator().manual_seed(num_tokens)
    return {
        "x": normal(generator, BATCH, num_tokens, CHANNELS),
        "length": normal(generator, BATCH, num_tokens, CHANNELS).exp(),
        "a": -decay * normal(generator, CHANNELS, SIZE).exp(),
        "b": normal(generator, BATCH, num_tokens, SIZE),
        "c": normal(generator, BATCH, num_tokens, SIZE),
        "state": normal(generator, BATCH, CHANNELS, SIZE),
    }


def mamba1_loop(
    x: torch.Tensor, length: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, state: torch.Tensor
) -> list[torch.Tensor]:
    """The recurrence as the paper has it, in float64."""
    outputs = []
    for t in range(x.shape[1]):
        state = state * (length[:, t, :, None] * a).exp() + (length * x)[:, t, :, None] * b[:, t, None]
        outputs.append((state * c[:, t, None]).sum(-1))
    return [torch.stack(outputs, dim=1), state]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 16, 61, 256])
def test_mamba_chunks_follow_the_recurrence(num_tokens: int, decay: str) -> None:
    given = mamba1_arguments(num_tokens, DECAYS[decay])
    assert_close(selective_scan(**{name: value.float() for name, value in given.items()}), mamba1_loop(**given))
