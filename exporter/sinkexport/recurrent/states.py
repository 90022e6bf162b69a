"""States of fixed size: their names, shapes and dtypes, and the tokens that change them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

StateKey = tuple[str, int]
"""Kind of `RECURRENT_KINDS` and transformers' state_idx, both of one layer."""


@dataclasses.dataclass(frozen=True)
class FixedState:
    """One state of one layer. shape: of one stream, without B."""

    shape: tuple[int, ...]
    dtype: torch.dtype


RecurrentShapes = Mapping[int, Mapping[StateKey, FixedState]]
"""States by layer, then by kind and index."""


def state_name(layer: int, key: StateKey) -> str:
    """Name of the graph's input: ``<kind>.<layer>``, or ``<kind>.<layer>.<index>`` from index 1 on."""
    kind, index = key
    return f"{kind}.{layer}.{index}" if index else f"{kind}.{layer}"


def state_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> FixedState:
    """The state of a kind in a model of a dtype: sums over many tokens are float32, last inputs have the dtype."""
    return FixedState(shape, dtype if kind == "conv" else torch.float32)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """T tokens of each of B streams.

    is_token: bool [B, T]; what is none leaves the states as they are. num_valid: int64 [1] where T > 1, the number of
    tokens, which come first, and B is 1; None: T is 1. position: int64 [B], of the first token in its stream.
    """

    is_token: torch.Tensor
    num_valid: torch.Tensor | None
    position: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.is_token.shape[1]

    @property
    def begins(self) -> torch.Tensor:
        """bool [B, T], the first token of a stream."""
        return (self.position == 0)[:, None] & (torch.arange(self.num_tokens) == 0)
