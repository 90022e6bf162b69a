"""Kimi delta attention (Kimi Linear, arXiv:2510.26692): the gated delta rule with a decay for every key channel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sinkexport.recurrent.delta_rule import DecayMasks
from sinkexport.recurrent.rules import CacheRule, has_functions, replaced_functions
from sinkexport.recurrent.states import StateKey, Tokens
from sinkexport.recurrent.step_cache import StepCache

_FUNCTIONS = "recurrent_kimi_delta_attention", "chunk_kimi_delta_attention"
"""Names of the two forms in each family's own module of transformers."""


def covers(module: Any, keys: frozenset[StateKey]) -> bool:
    """Whether a module with states of these keys has Kimi delta attention and one short convolution."""
    return keys == {("conv", 0), ("recurrent", 0)} and has_functions(module, *_FUNCTIONS)


@contextlib.contextmanager
def kimi_rules(model: Any, _cache: StepCache, tokens: Tokens) -> Iterator[None]:
    """Make a model's Kimi delta attention skip what is no token, and compute by `kimi_delta_attention`."""
    masks, counts = ChannelMasks(tokens.num_tokens), tokens.is_token[..., None]

    def replaced(_theirs: Callable[..., Any]) -> Callable[..., Any]:
        def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **named: Any) -> Any:
            named["g"] = named["g"] * counts[..., None].to(named["g"].dtype)
            named["beta"] = named["beta"] * counts.to(named["beta"].dtype)
            return kimi_delta_attention(query, key, value, masks=masks, **named)

        return run

    with replaced_functions(model, dict.fromkeys(_FUNCTIONS, replaced)):
        yield


class ChannelMasks(DecayMasks):
    """Constants of a chunk of T tokens where every channel decays by itself.

    around: by width of blocks, as `below`: float32 [T, T]. A row sums the logarithms of decays between its token and
    the middle of its pair of blocks: up to the token in the later block, after it in the earlier one.
    """

    def __init__(self, num_tokens: int) -> None:
        super().__init__(num_tokens)
        row, column = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)
        self.around = []
        for i in range(len(self.below)):
            block, is_later = row >> i, (row >> i) % 2 == 1
            in_block = column >> i == block
            self.around.append((in_block & torch.where(is_later, column <= row, column > row)).float())
        self.after = (row < column).float()
        self.own = torch.eye(num_tokens)


def kimi_delta_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    masks: ChannelMasks,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """T tokens of the rule at once, in float32.

    Every token t decays row d of the state S by exp(g_td), then writes beta_t (v_t - S^T k_t) to where k_t points, then
    reads S^T q_t. What tokens write solves a unit lower triangular system, as in `chunk_gated_delta_rule`. Its entries
    need the decay between two tokens for every channel. Each pair of tokens lies in neighbouring blocks of one width:
    there the decay is that of the earlier token to the border, times that from the border to the later one. Both are
    at most 1, and one matmul a width has them all.

    query, key: [B, T, H, Dk]; value: [B, T, H, Dv]; g: [B, T, H, Dk]; beta: [B, T, H]; g and beta are 0 for what is no
    token. initial_state: [B, H, Dk, Dv]. Returns: [B, T, H, Dv] of the query's dtype, and the state after the last
    token.
    """
    dtype, num_tokens = query.dtype, query.shape[1]
    q, k, v, logs = (x.transpose(1, 2).float() for x in (query, key, value, g))  # [B, H, T, D]
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    rate = beta.transpose(1, 2).float()[..., None]  # [B, H, T, 1]
    state = initial_state.float()
    if num_tokens == 1:
        state = logs.exp().mT * state
        state = state + k.mT @ (rate * (v - k @ state))
        return (q @ state).transpose(1, 2).to(dtype), state

    inverse, reads = masks.own, masks.own * (q * k).sum(dim=-1, keepdim=True)  # [B, H, T, T]
    for below, around in zip(masks.below, masks.around, strict=True):
        decay = torch.exp(around @ logs)  # [B, H, T, Dk]
        k_decayed = k * decay
        pairs = torch.cat([rate * k_decayed, q * decay], dim=2) @ k_decayed.mT  # [B, H, 2T, T]
        system, read = pairs.split(num_tokens, dim=2)
        # [[A, 0], [C, B]] has the inverse [[A', 0], [-B' C A', B']].
        inverse = inverse - (inverse @ (system * below) @ inverse)
        reads = reads + read * below
    since_start = torch.exp(masks.causal @ logs)
    # One matmul, so that the new state comes after all that read the old one: they share a buffer.
    seen_by_k, seen_by_q = (torch.cat([k * since_start, q * since_start], dim=2) @ state).split(num_tokens, dim=2)
    written = inverse @ (rate * (v - seen_by_k))
    out = seen_by_q + reads @ written
    after = since_start[:, :, -1:].mT * state + (k * torch.exp(masks.after @ logs)).mT @ written
    return out.transpose(1, 2).to(dtype), after


KIMI_DELTA_RULE = CacheRule("Kimi delta attention", covers, kimi_rules)
