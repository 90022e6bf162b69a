"""A stand-in for transformers' cache that holds explicit states while tokens are traced."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from sinkexport.recurrent.states import StateKey, Tokens

LayerStates = dict[StateKey, torch.Tensor]
"""States [B, ..] of one layer."""


class _NoLayer:
    """Stands in for a layer's cache: nothing came before. indexer_position_ids: of earlier tokens (Qwen4 exp)."""

    def __init__(self) -> None:
        self.indexer_position_ids: torch.Tensor | None = None


class StepCache:
    """Stands in for transformers' cache while T tokens of each of B streams are traced.

    states: by layer. after: what became of them. last_read: layer and key of the recurrent state that a layer last
    asked for, for rules that get no state. num_reads: times that layers asked.
    """

    def __init__(self, states: Mapping[int, Mapping[StateKey, torch.Tensor]], tokens: Tokens) -> None:
        self._before = states
        self._tokens = tokens
        # A step writes states in place, which a graph's input does not allow.
        self.after: dict[int, LayerStates] = {
            layer: {key: state.clone() for key, state in one.items()} for layer, one in states.items()
        }
        self.last_read: tuple[int, StateKey] | None = None
        self.num_reads = 0
        self.layers: defaultdict[int, _NoLayer] = defaultdict(_NoLayer)

    def finish(self) -> None:
        """Undo what a step made of the convolutions' states in streams that have no token."""
        if self._tokens.num_valid is not None:
            return
        for layer, after in self.after.items():
            for key in after:
                if key[0] == "conv":
                    after[key] = torch.where(self._tokens.is_token[..., None], after[key], self._before[layer][key])

    def read(self) -> torch.Tensor:
        """The recurrent state that a layer last asked for."""
        if self.last_read is None:
            raise RuntimeError("a rule without a state")
        layer, key = self.last_read
        return self.after[layer][key]

    def write(self, state: torch.Tensor) -> None:
        """Put a state in the place of the one that a layer last asked for."""
        if self.last_read is None:
            raise RuntimeError("a rule without a state")
        layer, key = self.last_read
        self.after[layer][key] = state

    def update(self, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax attention keeps its tokens elsewhere."""
        return k, v

    def get_seq_length(self, *_: Any) -> int:
        """Positions are given."""
        return 0

    def get_mask_sizes(self, num_queries: int, *_: Any) -> tuple[int, int]:
        """Keys that a mask is for, and how many came before: softmax attention keeps its tokens elsewhere."""
        return num_queries, 0

    def get_query_offset(self, *_: Any) -> int:
        """Place of the first query among the keys of a mask."""
        return 0

    def is_recording_past(self, _layer: int) -> bool:
        """No."""
        return False

    def has_previous_state(self, *_: Any) -> bool:
        """Every state is given."""
        return True

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor:
        """Hand out the last inputs of a convolution, which a step writes in place."""
        return self.after[layer_idx]["conv", state_idx]

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        """conv_states [B, channels, T] -> [B, channels, kernel + T], what came before included."""
        before, num_valid = self._before[layer_idx]["conv", state_idx], self._tokens.num_valid
        seen = torch.cat([before, conv_states.to(before.dtype)], dim=-1)
        kernel = before.shape[-1]
        self.after[layer_idx]["conv", state_idx] = (
            seen[..., -kernel:] if num_valid is None else seen.index_select(-1, num_valid + torch.arange(kernel))
        )
        return seen

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor:
        """Hand out a recurrent state."""
        self.last_read, self.num_reads = (layer_idx, ("recurrent", state_idx)), self.num_reads + 1
        return self.read()

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        """The state after the tokens."""
        self.after[layer_idx]["recurrent", state_idx] = recurrent_states
        return recurrent_states
