"""A model's logits in the middle of an endless stream: what attention gives where the cache has long been full.

To get there token by token takes as many steps as the cache has tokens. Here the caches are given, whatever is in them,
and a few tokens go through the model in one pass. Each attends once to the window, as tokens stand in the stream, and
once to the sinks, as they stand in the cache: the two share a softmax because query and keys of either kind have
dimensions of their own, where the other kind has zeros. Rotation and attention are the model's own functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sinkexport.families.interface import intercept_attention, layer_of, own_values
from sinkexport.reference.own_attention import plain_attention
from sinkexport.reference.own_rotation import OwnRotation

LayerStates = Mapping[str, torch.Tensor]
"""``sink_k, sink_v`` [B, Hkv, S, D], absent if S = 0, and ``window_k, window_v`` [B, Hkv, W, D], in the model's dtype,
keys rotated; the window's token u is in slot (u - S) mod W."""


def typical_sizes(model: Any, ids: torch.Tensor) -> dict[int, tuple[float, float]]:
    """Root mean squares of keys and of values of each layer, of ids [B, N] that see nothing but themselves."""
    sizes = {}

    def attend(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        k_size, v_size = (float(x.double().square().mean().sqrt()) for x in (k, v))
        sizes[layer_of(module)] = (k_size, v_size)
        return own_values(q, v), None

    with torch.no_grad(), intercept_attention(model, attend):
        model(input_ids=ids, use_cache=False)
    return sizes


def logits_from(model: Any, ids: torch.Tensor, position: int, layers: Mapping[int, LayerStates]) -> torch.Tensor:
    """Logits [B, n, vocab] after each of ids [B, n], the first at `position`, in the model's dtype.

    layers: the caches before, all of them full: position >= S + W everywhere. Linear attention begins anew.
    The model, in evaluation mode, must not rotate by the length of a text. With ALiBi, n must be 1.

    Raises: UsageError if the model's attention or rotation cannot be followed.
    """
    rotation = OwnRotation(model, position)
    rotation.learn()
    place = position + torch.arange(ids.shape[1])

    def attend(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _mask: Any = None, **arguments: Any
    ) -> tuple[torch.Tensor, None]:
        before = layers[layer_of(module)]
        window_size = before["window_k"].shape[2]
        sink_k, sink_v = (before.get(name, k[:, :, :0]) for name in ("sink_k", "sink_v"))
        num_sinks = sink_k.shape[2]
        tokens = torch.arange(position - window_size + 1, position)  # what the first of the new ones sees
        slots = (tokens - num_sinks) % window_size
        q_sink = q
        if rotation.rotates(module):
            q_sink = rotation.turned(module, q, place.clamp(max=num_sinks + window_size - 1))
            q, k = (rotation.turned(module, x, place) for x in (q, k))
        window_k, window_v = (
            torch.cat((before[name][:, :, slots], new), dim=2) for name, new in (("window_k", k), ("window_v", v))
        )
        behind = place[:, None] - torch.cat((tokens, place))
        unseen = (behind < 0) | (behind >= window_size)
        unseen = torch.cat((torch.zeros(len(place), num_sinks, dtype=torch.bool), unseen), dim=1)  # [n, S + ..]
        mask = torch.zeros(unseen.shape, dtype=q.dtype).masked_fill_(unseen, float("-inf"))[None, None]
        arguments["scaling"] = q.shape[-1] ** -0.5 if arguments.get("scaling") is None else arguments["scaling"]
        for_sinks, for_window = (torch.zeros_like(x) for x in (window_k, sink_k))
        keys = torch.cat((torch.cat((for_window, sink_k), dim=-1), torch.cat((window_k, for_sinks), dim=-1)), dim=2)
        queries, values = torch.cat((q, q_sink), dim=-1), torch.cat((sink_v, window_v), dim=2)
        return plain_attention(module)(module, queries, keys, values, mask, **arguments)[0], None

    with torch.no_grad(), intercept_attention(model, attend), rotation.removed():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits
