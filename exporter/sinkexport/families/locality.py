"""Does anything but attention carry something from token to token, and do positions reach anything but rotation?

Found out by behaviour. With the rotation taken away and an attention in which each token sees itself alone, a decoder
is a function of one token: what came before it must not change it, and where it stands nothing but its queries. A short
convolution over queries, a recurrent block beside attention, a shift of tokens or learned positions would.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from sinkrt.contract import RECURRENT_KINDS
from sinkrt.errors import UsageError, problem

from sinkexport.families.interface import intercept_attention, random_embeddings
from sinkexport.families.linear_attention import linear_layers, recurrent_cache
from sinkexport.families.query_scale import LongCache, measured_scales
from sinkexport.families.rope import ModelRotary, identity_rotary, replaced_rotary

NUM_BEFORE = 5
"""Tokens before the one that is looked at."""

FAR = 2**20
"""A position that no factor of position overlooks: some change at every 8,192nd token only."""

Tensors = dict[str, torch.Tensor]
"""Queries, keys and values of each layer, and the logits, of the last token, by name."""


def refuse_other_states(model: Any, rotary: ModelRotary) -> None:
    """Refuse a model whose token depends on others but by attention and by the states of known linear layers.

    Nor may anything but rotation and queries depend on where a token stands.

    Raises: UsageError.
    """
    x = [2 * NUM_BEFORE]
    texts = list(range(NUM_BEFORE)) + x, list(range(NUM_BEFORE, 2 * NUM_BEFORE)) + x
    first = _last_token(model, rotary, texts[0], 0)
    try:
        far = _last_token(model, rotary, texts[0], FAR)
    except IndexError:  # a table of positions, which ends
        far = None
    if far is None or (changed := _changed(_without_queries(first), far, model)):
        what = "a table of positions" if far is None else changed
        raise UsageError(
            problem(
                "positions",
                received=f"a use outside the rotary embedding ({what})",
                expected="rotary or ALiBi positions, or a scale of queries",
                fix="this model cannot be exported exactly",
            )
        )
    other = first if linear_layers(model) else _last_token(model, rotary, texts[1], 0)
    changed = _changed(first, other, model)
    if linear_layers(model):
        changed = changed or _changed_in_streams(model, rotary, texts)
    if changed:
        raise UsageError(
            problem(
                "model",
                received=f"a state beside attention: earlier tokens change {changed}",
                expected="softmax attention, or linear attention in layers of its own",
                fix="this model cannot be exported exactly",
            )
        )


def query_scales(model: Any, rotary: ModelRotary, capacity: int) -> dict[int, torch.Tensor]:
    """Factors float64 [C] by attention call where the length of a cache, as a position, changes queries.

    Raises: UsageError if it changes anything else.
    """
    if linear_layers(model):
        return {}
    ids = list(range(NUM_BEFORE + 1))
    first = _last_token(model, rotary, ids, 0)
    try:
        far = _last_token(model, rotary, ids, 0, LongCache(FAR))
    except Exception:  # no model of ours, which is never given such a cache
        return {}
    if _changed(first, far, model) is None:
        return {}
    if other := _changed(_without_queries(first), far, model):
        raise UsageError(
            problem(
                "positions",
                received=f"a use of the length of the cache ({other})",
                expected="rotary or ALiBi positions, or a scale of queries",
                fix="this model cannot be exported exactly",
            )
        )
    dtype = next(model.parameters()).dtype
    return measured_scales(model, lambda num_tokens: identity_rotary(rotary, 1, num_tokens, dtype), capacity)


def _without_queries(found: Tensors) -> Tensors:
    return {name: x for name, x in found.items() if not name.startswith("queries")}


def _changed_in_streams(model: Any, rotary: ModelRotary, texts: tuple[list[int], list[int]]) -> str | None:
    """Name of what depends on more than the states of linear layers, of the last token; None: nothing does.

    The states after the start of a text are kept, another text is fed, and the text goes on with what was kept.
    """
    cache = recurrent_cache(model)
    _last_token(model, rotary, texts[0][:-1], 0, cache)
    if other := _other_states(model, cache):
        return f"a state of layer {other[0]} that is none of linear attention's"
    kept = copy.deepcopy(cache)
    first = _last_token(model, rotary, texts[0][-1:], 0, cache)
    _last_token(model, rotary, texts[1][:-1], 0, recurrent_cache(model))
    return _changed(first, _last_token(model, rotary, texts[0][-1:], FAR, kept), model)


def _other_states(model: Any, cache: Any) -> list[int]:
    """Layers that have put something into a cache of `recurrent_cache` that belongs to no linear attention."""
    linear, found = linear_layers(model), []
    for layer, one in enumerate(cache.layers):
        known = {f"{kind}_states" for kind in RECURRENT_KINDS} if layer in linear else set()
        values = [
            x
            for name, value in vars(one).items()
            if name not in known
            for x in (value.values() if isinstance(value, dict) else [value])
        ]
        if any(isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel() for x in values):
            found.append(layer)
    return found


def _last_token(model: Any, rotary: ModelRotary, ids: list[int], position: int, cache: Any | None = None) -> Tensors:
    """Tensors of the last of these tokens, the first standing at `position`. Linear layers go on from `cache`."""
    found: Tensors = {}

    def attend(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        layer = int(module.layer_idx)
        found.update(
            {
                f"{name} of layer {layer}": x[0, :, -1].double()
                for name, x in (("queries", q), ("keys", k), ("values", v))
            }
        )
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).transpose(1, 2).contiguous(), None

    dtype = next(model.parameters()).dtype
    tokens = torch.tensor([ids])
    positions = position + torch.arange(len(ids))[None]
    cache = recurrent_cache(model) if cache is None else cache
    with (
        torch.no_grad(),
        random_embeddings(model, 2 * NUM_BEFORE + 1),
        intercept_attention(model, attend),
        replaced_rotary(model, identity_rotary(rotary, 1, len(ids), dtype)),
    ):
        output = model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=False)
    found["logits"] = output.logits[0, -1:].double()
    return found


def _changed(first: Tensors, second: Tensors, model: Any) -> str | None:
    """The first of these that differs by more than rounding; None: none does."""
    dtype = next(model.parameters()).dtype
    share = max(1e-4, 16 * torch.finfo(dtype).eps)
    for name, wanted in first.items():
        if not bool(wanted.isfinite().all()):
            continue  # whoever computes with the model refuses it: nothing can be compared here
        error, size = float((second[name] - wanted).abs().max()), float(wanted.abs().max())
        if not error <= share * size:
            return name
    return None
