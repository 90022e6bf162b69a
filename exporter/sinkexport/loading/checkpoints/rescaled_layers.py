"""RWKV's layers, which transformers divides by powers of two before their first pass (arXiv:2305.13048)."""

from __future__ import annotations

import functools
from typing import Any

import torch


def keep_saved_weights(model: Any) -> None:
    """Make a model that divides weights in place divide what they multiply instead: its weights stay those of the file.

    Every `rescale_every` layers the hidden states are halved, so that float16 holds them, and two matrices of each
    layer are divided by as much. Powers of two are exact: the outputs are the same.
    """
    every = getattr(model.config, "rescale_every", 0)
    for module in model.modules():
        if getattr(module, "layers_are_rescaled", None) is not False:
            continue
        module.layers_are_rescaled = True  # it still halves its hidden states
        for layer, block in enumerate(module.blocks if every > 0 else ()):
            share = 0.5 ** (layer // every)
            for matrix in (block.attention.output, block.feed_forward.value) if share < 1 else ():
                matrix.register_forward_pre_hook(functools.partial(_divided, share))


def _divided(share: float, _module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Inputs [.., N] of a matrix, times a share."""
    return (inputs[0] * share,)
