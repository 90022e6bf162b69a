"""A model's own dense attention, to its sinks as `SinkTuning` says (ZeroTuning, arXiv:2505.11739; ACT, 2406.15765),
and with weights that are scaled and shifted (affine-scaled attention, arXiv:2602.23057).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from sinkrt.contract import ActTuning, Manifest

from sinkexport.evaluation.comparison import Ids, Logits
from sinkexport.model.interface import intercept_attention
from sinkexport.reference.affine import AffineReference
from sinkexport.reference.own_attention import calibration, plain_attention
from sinkexport.variants.affine import AffineFile


@contextlib.contextmanager
def first_token_scaled(
    model: Any, scale: torch.Tensor, act: ActTuning | None = None, num_sinks: int = 0, affine: AffineFile | None = None
) -> Iterator[set[int]]:
    """For the length of a context, `model` attends causally, each layer and head with its factor on token 0.

    scale: float [L, Hq] > 0, read at every call, so that it may be changed in between. The family's own plain attention
    is called, with the factors' logarithms in its mask; rows of a batch begin with their first token.
    act: later sinks, tokens from num_sinks on, are scaled down after that.
    affine: scales and biases of the weights, after that; None: they are those of the softmax.
    Yields: the layers, seen so far, that have a sliding window of their own.
    """
    sliding: set[int] = set()
    reference = AffineReference(affine)

    def attend(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _mask: Any = None, **arguments: Any
    ) -> tuple[torch.Tensor, None]:
        num_tokens = q.shape[2]
        behind = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)  # [T, T], tokens from key to query
        own_window = arguments.get("sliding_window") or num_tokens
        if arguments.get("sliding_window"):
            sliding.add(int(module.layer_idx))
        seen = (behind >= 0) & (behind < own_window)
        mask = torch.zeros(num_tokens, num_tokens, dtype=q.dtype).masked_fill_(~seen, float("-inf"))
        factors = scale[int(module.layer_idx)].double().log().to(q.dtype)  # [Hq]
        mask = mask.expand(1, factors.numel(), -1, -1)
        if factors.any():
            mask = torch.cat((mask[..., :1] + factors.view(1, -1, 1, 1), mask[..., 1:]), dim=-1)
        out, weights = plain_attention(module)(module, q, k, v, mask, **arguments)[:2]
        if act is not None and any(act.heads[int(module.layer_idx)]):
            received, queries = weights.double().cumsum(dim=2), (behind + 1).clamp(min=0)
            factors = calibration(act, int(module.layer_idx), weights, received, queries, num_sinks)
            out = plain_attention(module)(module, q, k, v, mask + factors.log().to(q.dtype), **arguments)[0]
        return reference.changed(module, out, v, seen), None

    with intercept_attention(model, attend), reference.watching(model):
        yield sliding


def dense_logits(model: Any, ids: Ids, manifest: Manifest, affine: AffineFile | None = None) -> Logits:
    """The model's own logits [B, n, vocab] of ids [B, n], with no cache, and its default attention unless the bundle's
    is tuned. affine: of the bundle.
    """
    tuned: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if (tuning := manifest.sink_tuning) is not None:
        scale = torch.tensor(tuning.first_token_scale)
        tuned = first_token_scaled(model, scale, tuning.act, manifest.stream.num_sink_tokens, affine)
    elif affine is not None:
        ones = torch.ones(manifest.model.num_layers, manifest.model.num_q_heads)
        tuned = first_token_scaled(model, ones, affine=affine)
    with torch.no_grad(), tuned:
        logits: Logits = model(input_ids=torch.from_numpy(ids), use_cache=False).logits.float().numpy()
    return logits
