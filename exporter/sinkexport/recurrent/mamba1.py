"""Mamba (arXiv:2312.00752): N numbers a channel, each with its own decay, a step or a chunk at a time.

Jamba, Zamba, Mamba and Falcon Mamba share transformers' two functions for it. That for a text begins with zeros
whatever the cache holds; here a chunk goes on from the state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from sinkexport.recurrent.rules import CacheRule, has_functions, replaced_functions
from sinkexport.recurrent.scan import linear_scan
from sinkexport.recurrent.states import StateKey, Tokens
from sinkexport.recurrent.step_cache import StepCache

_STEP, _CHUNK = "mamba_selective_state_update", "mamba_selective_scan"
"""Names of the two forms in each family's own file of transformers."""


def covers(module: Any, keys: frozenset[StateKey]) -> bool:
    """Whether a module with states of these keys is a Mamba mixer."""
    return keys == {("conv", 0), ("recurrent", 0)} and has_functions(module, _STEP, _CHUNK)


class _Heads:
    """States of one layer, which Zamba scans head after head: [B, I, N] or [B, heads, I, N]."""

    def __init__(self, cache: StepCache) -> None:
        self._cache = cache
        self._num_reads = 0
        self._after: list[torch.Tensor] = []

    def next(self) -> torch.Tensor:
        """The state [B, I, N] of the head that is scanned next."""
        if self._num_reads != self._cache.num_reads:
            self._num_reads, self._after = self._cache.num_reads, []
        state = self._cache.read()
        return state if state.dim() == 3 else state[:, len(self._after)]

    def put(self, after: torch.Tensor) -> None:
        """What became of that state."""
        self._after.append(after)
        state = self._cache.read()
        if state.dim() == 3:
            self._cache.write(after)
        elif len(self._after) == state.shape[1]:
            self._cache.write(torch.stack(self._after, dim=1))


@contextlib.contextmanager
def mamba1_rules(model: Any, cache: StepCache, tokens: Tokens) -> Iterator[None]:
    """Make a model's Mamba mixers skip what is no token, and compute chunks by `selective_scan`."""
    heads = _Heads(cache)

    def chunk(
        x: torch.Tensor,
        dt: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        *,
        D: torch.Tensor,  # noqa: N803
        z: torch.Tensor,
        delta_bias: torch.Tensor | None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, dt, b, c = (y.transpose(1, 2).float() for y in (x, dt, b, c))
        length = torch.nn.functional.softplus(dt if delta_bias is None else dt + delta_bias.float())
        out, after = selective_scan(x, length * tokens.is_token[..., None], a, b, c, heads.next())
        heads.put(after)
        out = (out + x * D.float()).transpose(1, 2) * torch.nn.functional.silu(z.float())
        return out.to(z.dtype), after

    def step(
        _state: torch.Tensor,
        x: torch.Tensor,
        dt: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        d: torch.Tensor,
        *,
        z: torch.Tensor,
        dt_bias: torch.Tensor | None,
        **_: Any,
    ) -> torch.Tensor:
        x, dt, b, c, z = (y[..., None] for y in (x, dt, b, c, z))
        out, _after = chunk(x, dt, a, b, c, D=d, z=z, delta_bias=dt_bias)
        return out[..., 0]

    with replaced_functions(model, {_STEP: lambda _: step, _CHUNK: lambda _: chunk}):
        yield


def selective_scan(
    x: torch.Tensor, length: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """T tokens of each stream, in log2(T) rounds: h decays by exp(length a), length x b is added, and h . c is read.

    x, length: float32 [B, T, I]; length is 0 for what is no token. a: [I, N] < 0. b, c: float32 [B, T, N]. state:
    float32 [B, I, N]. Returns: float32 [B, T, I] and the state after the last token.
    """
    decay = torch.exp(length[..., None] * a.float()).flatten(2)  # [B, T, I * N]
    inputs = ((length * x)[..., None] * b[:, :, None]).flatten(2)
    states = linear_scan(decay, inputs, state.flatten(1)).unflatten(2, tuple(a.shape))  # [B, T, I, N]
    return (states @ c[..., None])[..., 0], states[:, -1]


MAMBA1 = CacheRule("Mamba", covers, mamba1_rules)
