"""Which attention calls read the keys and values of an earlier one (Gemma 3n, Gemma 4), at all of many tokens.

A call that shares has no cache of its own, so that an exception at a few tokens would go unnoticed in a bundle.
"""

from __future__ import annotations

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


def shared_keys(model: Any, still: Replacements, num_tokens: int, recurrent_cache: Any | None) -> set[tuple[int, int]]:
    """Pairs (call, earlier call) whose keys and values are the same, bit by bit.

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
    return {
        (i, j)
        for i, pair in enumerate(seen)
        for j, earlier in enumerate(seen[:i])
        if all(torch.equal(x, y) for x, y in zip(pair, earlier, strict=True))
    }
