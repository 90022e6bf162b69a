"""Latent attention in the absorbed form, as a graph computes it; `sinkexport.families.latent` says what that is.

A layer's own expansion of keys and values stays in the trace without a reader, so it is dropped with its matrix. Its
two parts are constants of their own, views of the matrix while it is traced. They are read as MoE experts' matrices
are, one a head: in floating point or, with a recipe for weights, in INT8 (graph/passes/quantize_experts.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from sinkexport.families.latent import KEYS, VALUES, Latent, Pair
from sinkexport.model.experts import expert_matmul


@contextlib.contextmanager
def latent_parts(model: Any, latents: Iterable[Latent]) -> Iterator[None]:
    """The matrices have their parts beside them inside a context, as buffers.

    A trace then has the parts under names that say what they belong to.
    """
    owners: list[torch.nn.Module] = []
    try:
        for latent in latents:
            owner = model.get_submodule(latent.owner)
            if owner in owners:  # a module that is called in several layers
                continue
            for name, part in zip((KEYS, VALUES), latent.parts(model.get_parameter(latent.weight)), strict=True):
                owner.register_buffer(name, part.detach(), persistent=False)
            owners.append(owner)
        yield
    finally:
        for owner in owners:
            for name in (KEYS, VALUES):
                delattr(owner, name)


def absorbed(model: Any, latent: Latent, cached: Pair, q: torch.Tensor) -> Pair:
    """Query [B, H, T, R + L] and row [B, 1, T, R + L] of a call inside `latent_parts`, not rotated."""
    return latent.query(q, model.get_submodule(latent.owner).get_buffer(KEYS), _matmul), latent.row(cached)


def output_of_latents(model: Any, latent: Latent, latents: torch.Tensor) -> torch.Tensor:
    """A call's output [B, H, T, V] of its sums of latents [B, H, T, L], inside `latent_parts`."""
    return latent.output(latents, model.get_submodule(latent.owner).get_buffer(VALUES), _matmul)


def _matmul(x: torch.Tensor, weight: torch.Tensor, is_transposed: bool) -> torch.Tensor:
    out: torch.Tensor = expert_matmul(x, weight, None, is_transposed)
    return out
