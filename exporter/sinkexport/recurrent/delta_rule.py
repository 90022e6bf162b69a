"""The gated delta rule (arXiv:2412.06464) of Qwen3-Next, Qwen3.5 and others, a step or a chunk at a time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sinkexport.recurrent.rules import CacheRule, has_functions, replaced_functions
from sinkexport.recurrent.states import StateKey, Tokens
from sinkexport.recurrent.step_cache import StepCache

_STEP_RULE, _CHUNK_RULE = "torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"
"""Names of the two forms in each family's own module of transformers."""


def covers(module: Any, keys: frozenset[StateKey]) -> bool:
    """Whether a module with states of these keys has a gated delta rule and one short convolution."""
    return keys == {("conv", 0), ("recurrent", 0)} and has_functions(module, _STEP_RULE, _CHUNK_RULE)


@contextlib.contextmanager
def delta_rules(model: Any, _cache: StepCache, tokens: Tokens) -> Iterator[None]:
    """Make a model's gated delta rules skip what is no token, and compute chunks by `chunk_gated_delta_rule`."""
    masks = DecayMasks(tokens.num_tokens)

    def passing_over(rule: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, **named: Any) -> Any:
            counts = tokens.is_token[..., None]  # no decay and no update for what does not count
            return rule(*arguments, g=g * counts.to(g.dtype), beta=beta * counts.to(beta.dtype), **named)

        return run

    chunk = functools.partial(chunk_gated_delta_rule, masks=masks)
    with replaced_functions(model, {_STEP_RULE: passing_over, _CHUNK_RULE: lambda _: passing_over(chunk)}):
        yield


class DecayMasks:
    """Constants of a chunk of T tokens, the same in all layers: float32 [T, T]."""

    def __init__(self, num_tokens: int) -> None:
        row, column = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)
        self.causal, self.later = (row >= column).float(), (row > column).float()
        widths = [1 << i for i in range((num_tokens - 1).bit_length())]
        self.below = [((row // w % 2 == 1) & (column // w == row // w - 1)).float() for w in widths]
        """Lower left block of every pair of diagonal blocks of a width, by width."""


def chunk_gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    masks: DecayMasks,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """T tokens of the gated delta rule at once (arXiv:2412.06464, the chunkwise form), in float32.

    Every token t decays the state S by exp(g_t), then writes beta_t (v_t - S^T k_t) to where k_t points, then reads
    S^T q_t. With what it writes as row u_t and the decay since token j as d_tj = exp(g_j+1 + .. + g_t):
    u_t = beta_t (v_t - d_t0 S_0^T k_t - sum over j < t of d_tj (k_t . k_j) u_j), a unit lower triangular system.
    transformers' own form solves it row by row in a graph: T dependent nodes a layer. Here the inverse is put together
    from those of diagonal blocks, twice as wide each time, which takes log2(T) rounds and is as stable.

    query, key: [B, T, Hk, Dk]; value: [B, T, Hv, Dv], Hv a multiple of Hk; g, beta: [B, T, Hv]; initial_state: [B, Hv,
    Dk, Dv]. Returns: [B, T, Hv, Dv] of the query's type, and the state after the last token.
    """
    dtype, repeats = query.dtype, value.shape[2] // key.shape[2]
    if repeats != 1:
        query, key = (x.repeat_interleave(repeats, dim=2) for x in (query, key))
    q, k, v = (x.transpose(1, 2).float() for x in (query, key, value))  # [B, Hv, T, D]
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    rate = beta.transpose(1, 2).float()[..., None]  # [B, Hv, T, 1]
    logs = g.transpose(1, 2).float()[..., None]  # [B, Hv, T, 1]
    since_start = torch.exp(masks.causal @ logs)  # d_t0
    # d_tj, [B, Hv, T, T]: sums of their own, since differences of long sums would lose digits.
    since = torch.exp(masks.causal @ (logs * masks.later)) * masks.causal
    state = initial_state.float()

    system = rate * (k @ k.mT) * since
    inverse = torch.eye(g.shape[1])
    for below in masks.below:
        # [[A, 0], [C, B]] has the inverse [[A', 0], [-B' C A', B']].
        inverse = inverse - (inverse @ (system * below) @ inverse)
    # One matmul, so that the new state comes after all that read the old one: they share a buffer.
    seen_by_k, seen_by_q = (torch.cat([k, q], dim=2) @ state).split(g.shape[1], dim=2)
    written = inverse @ (rate * (v - since_start * seen_by_k))
    out = since_start * seen_by_q + ((q @ k.mT) * since) @ written
    after = since_start[:, :, -1:] * state + (k * since[:, :, -1:].mT).mT @ written
    return out.transpose(1, 2).to(dtype), after


DELTA_RULE = CacheRule("gated delta rule", covers, delta_rules)
