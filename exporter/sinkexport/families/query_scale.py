"""Queries that depend on their position otherwise than by rotation: a scale or a temperature (Llama 4, Ministral 3).

A function of position takes the query's in-cache position, min(t, C - 1). Where a model reads it off `position_ids`, it
is given that and its own code is traced. Llama 4 reads it off the length of its cache (arXiv:2501.19399), which streams
of a batch do not share; there, the factors of all in-cache positions are measured.
"""

from __future__ import annotations

from typing import Any

import torch
from sinkrt.errors import UsageError, problem

from sinkexport.families.interface import intercept_attention, own_values, random_embeddings
from sinkexport.families.recurrent import with_cache
from sinkexport.families.rope import Replacements, replaced_rotary

TOKENS_AT_ONCE = 256
"""Positions that are measured in one pass."""


class LongCache:
    """Stands in for transformers' cache: it says that so many tokens came before, and keeps nothing."""

    is_compileable = False

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def update(self, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Only these keys and values."""
        return k, v

    def get_seq_length(self, *_: Any) -> int:
        """Tokens that came before."""
        return self._num_tokens

    def get_query_offset(self, *_: Any) -> int:
        """Position of the first new token."""
        return self._num_tokens

    def get_mask_sizes(self, num_tokens: int, *_: Any) -> tuple[int, int]:
        """Number of keys, and where they begin."""
        return num_tokens, self._num_tokens


def measured_scales(model: Any, still: Any, capacity: int) -> dict[int, torch.Tensor]:
    """Factors float64 [C] on the queries of each attention call, relative to those of position 0, by call.

    still: makes rotary embeddings that turn nothing, of so many tokens. The same token stands at every position.

    Raises: UsageError if a query changes by more than a factor.
    """
    parts: list[list[torch.Tensor]] = []  # queries [Hq, T, D] of each call, by piece
    for start in range(0, capacity, TOKENS_AT_ONCE):
        parts.append(_queries(model, still, start, min(TOKENS_AT_ONCE, capacity - start)))
    scales: dict[int, torch.Tensor] = {}
    tolerance = max(1e-4, 16 * torch.finfo(next(model.parameters()).dtype).eps)  # queries are rounded once more
    for call, pieces in enumerate(zip(*parts, strict=True)):
        queries = torch.cat(pieces, dim=1)  # [Hq, C, D]
        first = queries[:, :1]
        factors = (queries * first).sum((0, 2)) / first.square().sum()  # [C]
        error = (queries - factors[:, None] * first).abs().amax()
        if not bool(error <= tolerance * queries.abs().amax()) or not bool((factors > 0).all()):
            raise UsageError(
                problem(
                    "positions",
                    received=f"queries of attention call {call} that change with the length of the cache",
                    expected="a factor above 0 on each query, or position_ids",
                    fix="this model cannot be exported exactly",
                )
            )
        if not bool((factors - 1).abs().max() <= 1e-6):
            scales[call] = factors
    return scales


def _queries(model: Any, still: Any, start: int, num_tokens: int) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def record(_module: Any, q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Any:
        found.append(q[0].double())
        return own_values(q, v), None

    replacements: Replacements = still(num_tokens)
    ids = torch.zeros(1, num_tokens, dtype=torch.int64)
    with (
        torch.no_grad(),
        random_embeddings(model, 1),
        intercept_attention(model, record),
        replaced_rotary(model, replacements),
    ):
        # position_ids stay 0: what a model reads off them is traced.
        model(input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False, **with_cache(model, LongCache(start)))
    return found
