"""Layers of linear attention between layers of softmax attention: which they are, and what they carry on.

transformers' own step runs for them (the gated delta rule of Qwen3-Next and Qwen3.5, arXiv:2412.06464), and asks its
cache for two states: the last inputs of a short convolution and the recurrent matrix. Both are zero where a stream
begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from sinkrt.contract import RECURRENT_KINDS
from sinkrt.errors import UsageError, problem

LINEAR = "linear_attention"
"""Name of such a layer in transformers' configurations."""

RecurrentShapes = Mapping[int, Mapping[str, tuple[int, ...]]]
"""Shape of one stream's state, by layer and kind (`RECURRENT_KINDS`)."""


def linear_layers(model: Any) -> frozenset[int]:
    """The layers of a model that have linear attention."""
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return frozenset(layer for layer, kind in enumerate(layer_types) if kind == LINEAR)


def recurrent_cache(model: Any) -> Any | None:
    """transformers' own cache for linear layers, into which softmax attention puts nothing; None: there are none."""
    if not linear_layers(model):
        return None
    from transformers import DynamicCache

    class RecurrentCache(DynamicCache):
        def update(self, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return k, v

    return RecurrentCache(config=model.config.get_text_config())


def recurrent_shapes(model: Any, cache: Any | None) -> RecurrentShapes:
    """Shapes of what the linear layers have put into a cache of `recurrent_cache`.

    Raises: UsageError for a layer with other states than those two.
    """
    shapes: dict[int, dict[str, tuple[int, ...]]] = {}
    for layer in sorted(linear_layers(model)):
        found = cache.layers[layer] if cache is not None else None
        states = [getattr(found, f"{kind}_states", {}) for kind in RECURRENT_KINDS]
        if any(len(state) != 1 or state[0] is None for state in states):
            raise UsageError(
                problem(
                    "model",
                    received=f"linear attention without a gated delta rule in layer {layer}",
                    expected="a convolution's and a recurrent state",
                    fix="this model cannot be exported exactly",
                )
            )
        shapes[layer] = {kind: tuple(state[0].shape[1:]) for kind, state in zip(RECURRENT_KINDS, states, strict=True)}
    return shapes
