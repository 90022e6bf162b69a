"""A model's own dense attention, to its sinks as `SinkTuning` says (ZeroTuning, arXiv:2505.11739; ACT, 2406.15765),
and with weights that are scaled and shifted (affine-scaled attention, arXiv:2602.23057).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from sinkexport.families.interface import intercept_attention, layer_of
from sinkexport.reference.affine import AffineReference
from sinkexport.reference.own_attention import calibration, plain_attention
from sinkexport.util.arrays import Ids, Logits
from sinkexport.variants.variant import PLAIN, AttentionVariant


@contextlib.contextmanager
def first_token_scaled(
    model: Any, scale: torch.Tensor | None, variant: AttentionVariant = PLAIN, num_sinks: int = 0
) -> Iterator[set[int]]:
    """Make `model` attend causally inside a context, each layer and head with its factor on token 0.

    scale: float [L, Hq] > 0, read at every call, so that it may be changed in between; None: no factors. The family's
    own plain attention is called, with the factors' logarithms in its mask; rows of a batch begin with their first
    token.
    variant: its `act` scales later sinks down after that, tokens from num_sinks on, and its `affine` the weights after
    that. Its own factors and windows are not read.
    Yields: the layers, seen so far, that have a sliding window.
    """
    sliding: set[int] = set()
    reference, act = AffineReference(variant.affine), variant.act

    def attend(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _mask: Any = None, **arguments: Any
    ) -> tuple[torch.Tensor, None]:
        num_tokens, layer = q.shape[2], layer_of(module)
        behind = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)  # [T, T], tokens from key to query
        sliding_window = arguments.get("sliding_window")
        if sliding_window:
            sliding.add(layer)
        seen = (behind >= 0) & (behind < (sliding_window or num_tokens))
        mask = torch.zeros(num_tokens, num_tokens, dtype=q.dtype).masked_fill_(~seen, float("-inf"))
        mask = mask.expand(1, q.shape[1], -1, -1)
        if scale is not None and (factors := scale[layer].double().log().to(q.dtype)).any():  # [Hq]
            mask = torch.cat((mask[..., :1] + factors.view(1, -1, 1, 1), mask[..., 1:]), dim=-1)
        out, weights = plain_attention(module)(module, q, k, v, mask, **arguments)[:2]
        if act is not None and any(act.heads[layer]):
            received, queries = weights.double().cumsum(dim=2), (behind + 1).clamp(min=0)
            rescaled = calibration(act, layer, weights, received, queries, num_sinks)
            out = plain_attention(module)(module, q, k, v, mask + rescaled.log().to(q.dtype), **arguments)[0]
        return reference.changed(module, out, v, seen), None

    with intercept_attention(model, attend), reference.watching(model):
        yield sliding


def dense_logits(model: Any, ids: Ids, variant: AttentionVariant = PLAIN, num_sinks: int = 0) -> Logits:
    """Logits [B, n, vocab] of ids [B, n] without a cache, by the model's default attention unless that is changed.

    n must be at most what every head's cache holds: windows are not read. num_sinks: S.
    """
    changed: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if variant.sink_tuning is not None or variant.affine is not None:
        tuning = variant.sink_tuning
        scale = None if tuning is None else torch.tensor(tuning.first_token_scale)
        changed = first_token_scaled(model, scale, variant, num_sinks)
    with torch.no_grad(), changed:
        logits: Logits = model(input_ids=torch.from_numpy(ids), use_cache=False).logits.float().numpy()
    return logits
