"""Which keys and values are copies, at all of many tokens: of an earlier call (Gemma 3n, Gemma 4), of other heads
(JetMoE, whose experts each get the same keys).

Copies are not cached, so that an exception at a few tokens would go unnoticed in a bundle.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from sinkexport.families.interface import intercept_attention, own_values, random_embeddings
from sinkexport.families.recurrent import with_cache
from sinkexport.families.rope import ModelRotary, Replacements, identity_rotary, replaced_rotary
from sinkexport.recurrent.registry import each_token_alone

MANY_TOKENS = 64
"""Tokens that must all show what lets a cache be left out: keys of an earlier call, or made of a latent."""


def many_tokens(model: Any, rotary: ModelRotary) -> tuple[Replacements, int]:
    """Rotary embeddings that turn nothing and their number of tokens: `MANY_TOKENS`, or what the model has."""
    num_tokens = min(MANY_TOKENS, int(model.config.get_text_config().vocab_size))
    return identity_rotary(rotary, 1, num_tokens, next(model.parameters()).dtype), num_tokens


@dataclasses.dataclass(frozen=True)
class Copies:
    """Keys and values of a pass that are the same, bit by bit.

    calls: pairs (call, earlier call). heads: of each call, see `distinct_heads`.
    """

    calls: frozenset[tuple[int, int]]
    heads: tuple[int, ...]

    @classmethod
    def of(cls, seen: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Copies:
        """Find the copies among the keys and values [.., H, T, D] of the calls of a pass."""
        pairs = (
            (i, j)
            for i, pair in enumerate(seen)
            for j, earlier in enumerate(seen[:i])
            if all(torch.equal(x, y) for x, y in zip(pair, earlier, strict=True))
        )
        return cls(frozenset(pairs), tuple(distinct_heads(k, v) for k, v in seen))

    def __and__(self, other: Copies) -> Copies:
        """Copies in both passes."""
        return Copies(self.calls & other.calls, tuple(map(math.lcm, self.heads, other.heads)))


def distinct_heads(k: torch.Tensor, v: torch.Tensor) -> int:
    """The smallest P so that head i of keys and values [.., H, T, D] is a copy of head i modulo P; H: none is one.

    There are as many heads of keys as of values, or none counts as a copy.
    """
    num_heads = max(k.shape[-3], v.shape[-3])
    for period in range(1, num_heads if k.shape[-3] == v.shape[-3] else 1):
        if num_heads % period == 0 and all(torch.equal(x[..., period:, :, :], x[..., :-period, :, :]) for x in (k, v)):
            return period
    return num_heads


def shared_keys(model: Any, still: Replacements, num_tokens: int, recurrent_cache: Any | None) -> Copies:
    """Copies among the keys and values of many tokens.

    still: rotary embeddings that turn nothing. recurrent_cache: an empty one, if the model needs one.
    """
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(_module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Any:
        seen.append((k, v))
        return own_values(q, v), None

    ids = torch.arange(num_tokens)[None]
    with (
        torch.no_grad(),
        random_embeddings(model, num_tokens),
        intercept_attention(model, record),
        replaced_rotary(model, still),
        each_token_alone(model),
    ):
        model(input_ids=ids, position_ids=ids, use_cache=False, **with_cache(model, recurrent_cache))
    return Copies.of(seen)
