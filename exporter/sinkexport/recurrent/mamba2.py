"""Mamba-2 (arXiv:2405.21060): a state matrix a head that decays by one number a token, a step or a chunk at a time.

Nemotron-H, Granite 4 hybrids, Bamba, Falcon-H1, Zamba2 and Mamba-2 itself share transformers' two functions for it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from sinkrt.errors import UsageError, problem

from sinkexport.recurrent.delta_rule import DecayMasks
from sinkexport.recurrent.rules import CacheRule, has_functions, replaced_functions
from sinkexport.recurrent.states import StateKey, Tokens
from sinkexport.recurrent.step_cache import StepCache

STEP, CHUNK = "mamba2_selective_state_update", "mamba2_chunk_scan"
"""Names of the two forms in each family's own file of transformers."""

Limits = tuple[float, float]
"""Smallest and largest length of a token's step in time."""


def covers(module: Any, keys: frozenset[StateKey]) -> bool:
    """Whether a module with states of these keys is a Mamba-2 mixer."""
    return keys == {("conv", 0), ("recurrent", 0)} and has_functions(module, STEP, CHUNK)


@contextlib.contextmanager
def mamba2_rules(model: Any, cache: StepCache, tokens: Tokens) -> Iterator[None]:
    """Make a model's Mamba-2 mixers skip what is no token, and compute chunks by `chunk_scan`.

    transformers limits the steps in time of a whole text, but not that of a single token. The text decides here.
    """
    masks, limits = DecayMasks(tokens.num_tokens), time_limits(model)

    def step(
        _state: torch.Tensor,
        x: torch.Tensor,
        dt: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        d: torch.Tensor,
        *,
        dt_bias: torch.Tensor,
        z: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        # One number a head has been spread over all its elements.
        length = step_lengths(dt[:, None, :, 0], dt_bias[:, 0], limits, tokens.is_token)[:, 0]
        out, after = step_scan(x, length, a[:, 0, 0], b, c, cache.read())
        cache.write(after)
        out = out + x.float() * d.float()
        return (out if z is None else out * torch.nn.functional.silu(z.float())).to(x.dtype)

    def chunk(
        x: torch.Tensor,
        dt: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        *,
        D: torch.Tensor,  # noqa: N803
        dt_bias: torch.Tensor,
        initial_states: torch.Tensor,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        length = step_lengths(dt, dt_bias, limits, tokens.is_token)
        out, after = chunk_scan(x, length, a, b, c, initial_states, masks)
        out = (out + x.float() * D.float()[:, None]).to(x.dtype)
        # Falcon-H1 views it in another shape. (`contiguous` is a node that the trace drops.)
        return out.clone(memory_format=torch.contiguous_format), after

    with replaced_functions(model, {STEP: lambda _: step, CHUNK: lambda _: chunk}):
        yield


def time_limits(model: Any) -> Limits:
    """Limits of a model's mixers.

    Raises: UsageError if layers differ in them.
    """
    found = {
        (float(module.time_step_limit[0]), float(module.time_step_limit[1]))
        for module in model.modules()
        if has_functions(module, STEP, CHUNK) and getattr(module, "time_step_limit", None) is not None
    }
    if len(found) > 1:
        raise UsageError(
            problem(
                "recurrent states",
                received=f"Mamba-2 layers with {len(found)} limits of their time steps",
                expected="one for all layers",
                fix="this model cannot be exported exactly",
            )
        )
    return found.pop() if found else (0.0, math.inf)


def step_lengths(dt: torch.Tensor, bias: torch.Tensor, limits: Limits, is_token: torch.Tensor) -> torch.Tensor:
    """Lengths of steps in time, float32 [B, T, H], of dt [B, T, H] and bias [H]; 0 for what is no token.

    is_token: bool [B, T].
    """
    length = torch.nn.functional.softplus(dt.float() + bias.float())
    if limits[0] > 0.0 or limits[1] < math.inf:
        length = length.clamp(limits[0], None if limits[1] == math.inf else limits[1])
    return length * is_token[..., None]


def step_scan(
    x: torch.Tensor, length: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of each stream: S decays by exp(length a), x b^T is added, and S c is read.

    x: [B, H, P]. length: float32 [B, H]. a: [H] < 0. b, c: [B, G, N], H a multiple of G. state: float32 [B, H, P, N].
    Returns: float32 [B, H, P] and the state after it.
    """
    num_heads, num_groups = x.shape[1], b.shape[1]
    b, c = (y.float().repeat_interleave(num_heads // num_groups, dim=1) for y in (b, c))  # [B, H, N]
    decay = torch.exp(length * a.float())[..., None, None]
    after = state * decay + (x.float() * length[..., None])[..., None] * b[:, :, None]
    return (after @ c[..., None])[..., 0], after


def chunk_scan(
    x: torch.Tensor,
    length: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    state: torch.Tensor,
    masks: DecayMasks,
) -> tuple[torch.Tensor, torch.Tensor]:
    """T tokens of each stream at once, in float32: `step_scan` of one after the other.

    With the decay since token j as d_tj = exp(a (length_j+1 + .. + length_t)), token t reads
    d_t0 S_0 c_t + sum over j <= t of d_tj (b_j . c_t) length_j x_j. Every sum of logarithms is one of its own, since
    differences of long sums would lose digits; nothing is divided by a decay.

    x: [B, T, H, P]. length: float32 [B, T, H]. a: [H] < 0. b, c: [B, T, G, N], H a multiple of G. state: float32
    [B, H, P, N]. Returns: float32 [B, T, H, P] and the state after the last token.
    """
    num_tokens, num_heads, num_groups = x.shape[1], x.shape[2], b.shape[2]
    size = num_heads // num_groups
    written = (x.float() * length[..., None]).permute(0, 2, 3, 1)  # [B, H, P, T]
    b, c = (y.float().transpose(1, 2)[:, :, None] for y in (b, c))  # [B, G, 1, T, N]
    logs = (length * a.float()).transpose(1, 2)[..., None]  # [B, H, T, 1]
    since = torch.exp(masks.causal @ (logs * masks.later)) * masks.causal  # d_tj, [B, H, T, T]
    since_start = torch.exp(masks.causal @ logs)  # d_t0, [B, H, T, 1]

    def by_group(values: torch.Tensor) -> torch.Tensor:
        return values.unflatten(1, (num_groups, size))

    reads = (by_group(since) * (c @ b.mT)).flatten(1, 2)  # [B, H, T, T]
    reads_state = (by_group(since_start) * c).flatten(1, 2)  # [B, H, T, N]
    kept = (by_group(since[:, :, -1:].mT) * b).flatten(1, 2)  # [B, H, T, N]
    # The state is read here alone, so that the new one comes after all that read the old: they share a buffer.
    joined = torch.cat([written, state], dim=-1)  # [B, H, P, T + N]
    out = torch.cat([reads, reads_state], dim=-1) @ joined.mT  # [B, H, T, P]
    after = since_start[:, :, -1:] * joined[..., num_tokens:] + written @ kept
    return out.transpose(1, 2), after


MAMBA2 = CacheRule("Mamba-2", covers, mamba2_rules)
