"""Does anything but attention carry something from token to token, and do positions reach anything but rotation?

Found out by behaviour. With the rotation taken away and an attention in which each token sees itself alone, a decoder
is a function of one token: what came before it must not change it, and where it stands nothing but its queries. A short
convolution over queries, a recurrent block beside attention, a shift of tokens or learned positions would.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

import torch
from sinkrt.contract import RECURRENT_KINDS
from sinkrt.errors import UsageError, problem

from sinkexport.families.interface import intercept_attention, layer_of, own_values, random_embeddings
from sinkexport.families.query_scale import LongCache, measured_scales
from sinkexport.families.recurrent import cached_states, recurrent_cache, recurrent_shapes, with_cache
from sinkexport.families.rope import ModelRotary, identity_rotary, replaced_rotary
from sinkexport.recurrent.registry import RecurrentStates, each_token_alone
from sinkexport.recurrent.states import RecurrentShapes, Tokens
from sinkexport.recurrent.step_cache import LayerStates

NUM_BEFORE = 16
"""Tokens before the one that is looked at: what drops tokens once there are many, as experts that are full, shows."""

TEXT = [*range(NUM_BEFORE), 2 * NUM_BEFORE]
"""Ids of a text. The last one occurs once."""

FAR = 2**20
"""A position that no factor of position overlooks: some change at every 8,192nd token only."""

OTHER_ORDER = 8.0
"""How much more rounding may explain where whole layers add in another order."""

QUERIES = "queries"

OPTIONS = ("scaling", "softcap", "s_aux")
"""Arguments of an attention function that may be numbers or depend on weights, and on no token."""

Tensors = dict[str, torch.Tensor]
"""Queries, keys, values and options of each attention call, and the logits, of the last token, by name."""


def refuse_other_states(model: Any, rotary: ModelRotary) -> Tensors:
    """Refuse a model whose token depends on others but by attention and by the states of known recurrent layers.

    Others are those before it and those of other streams of a batch. Nor may anything but rotation and queries depend
    on where a token stands.
    Returns: what the last token of TEXT has, whose first is at position 0.

    Raises: UsageError.
    """
    x = TEXT[-1:]
    texts = TEXT, list(range(NUM_BEFORE, 2 * NUM_BEFORE)) + x
    cache = recurrent_cache(model)
    first = _last_token(model, rotary, texts[0], 0, cache)
    has_states = bool(cached_states(cache))
    try:
        far = _last_token(model, rotary, texts[0], FAR)
    except (IndexError, RuntimeError) as error:
        if not _is_end_of_table(error):
            raise
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
    if has_states:
        changed = _changed_in_streams(model, rotary, texts)
    else:
        changed = _changed(first, _last_token(model, rotary, texts[1], 0), model)
        changed = changed or _changed_alone(model, rotary, first, x)
    if shapes := recurrent_shapes(model, cache):
        changed = changed or _changed_in_calls(model, rotary, texts[0], shapes)
        if not changed and (other := _changed_by_rules(model, rotary, texts[0], shapes)):
            raise UsageError(
                problem(
                    "recurrent states",
                    received=f"layers that do not follow the rule of their class: it changes {other}",
                    expected="layers as transformers has them",
                    fix="this model cannot be exported exactly",
                )
            )
    if beside := changed or _changed(first, _last_token(model, rotary, texts[0], 0, beside=texts[1][::-1]), model):
        who = "earlier tokens" if changed else "other streams of a batch"
        raise UsageError(
            problem(
                "model",
                received=f"a state beside attention: {who} change {beside}",
                expected="softmax attention, and recurrent layers of known rules",
                fix="this model cannot be exported exactly",
            )
        )
    return first


def _changed_alone(model: Any, rotary: ModelRotary, first: Tensors, ids: list[int]) -> str | None:
    """Name of what a token has otherwise if none comes before it; None: nothing.

    Queries may depend on the length of a cache: it then says that as many came before.
    """
    changed = _changed(first, _last_token(model, rotary, ids, NUM_BEFORE), model)
    if changed is not None and changed.startswith(QUERIES):
        with contextlib.suppress(Exception):  # a model that takes no such cache
            changed = _changed(first, _last_token(model, rotary, ids, NUM_BEFORE, LongCache(NUM_BEFORE)), model)
    return changed


def _is_end_of_table(error: Exception) -> bool:
    """Whether a model has read past the end of a table of positions. torch has several words for it."""
    return isinstance(error, IndexError) or "out of bounds" in str(error)


def query_scales(model: Any, rotary: ModelRotary, capacity: int, first: Tensors) -> dict[int, torch.Tensor]:
    """Factors float64 [C] by attention call where the length of a cache, as a position, changes queries.

    first: as `refuse_other_states` returns it.

    Raises: UsageError if it changes anything else.
    """
    if recurrent_cache(model) is not None:  # its layers have a length of their own
        return {}
    try:
        far = _last_token(model, rotary, TEXT, 0, LongCache(FAR))
    except Exception as error:
        if _is_end_of_table(error):
            raise UsageError(
                problem(
                    "positions",
                    received="a table of positions, which is read at the length of the cache",
                    expected="rotary or ALiBi positions, or a scale of queries",
                    fix="this model cannot be exported exactly",
                )
            ) from error
        return {}  # no model of ours, which is never given such a cache
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
    return {name: x for name, x in found.items() if not name.startswith(QUERIES)}


def _changed_in_streams(model: Any, rotary: ModelRotary, texts: tuple[list[int], list[int]]) -> str | None:
    """Name of what depends on more than the states of recurrent layers, of the last token; None: nothing does.

    The states after the start of a text are kept, another text is fed, and the text goes on with what was kept.
    """
    cache = recurrent_cache(model)
    _last_token(model, rotary, texts[0][:-1], 0, cache)
    if other := _other_states(cache):
        return f"a state of layer {other[0]} that is no convolution's and not recurrent"
    kept = copy.deepcopy(cache)
    first = _last_token(model, rotary, texts[0][-1:], 0, cache)
    _last_token(model, rotary, texts[1][:-1], 0, recurrent_cache(model))
    return _changed(first, _last_token(model, rotary, texts[0][-1:], FAR, kept), model)


def _changed_in_calls(model: Any, rotary: ModelRotary, ids: list[int], shapes: RecurrentShapes) -> str | None:
    """Name of what the last token has otherwise if it comes in a call of its own; None: nothing.

    Recurrent layers follow their rules, and their states are all that the first call leaves to the second.
    """
    begin = _begin(shapes)
    whole, _ = _by_rules(model, rotary, ids, 0, begin)
    _, kept = _by_rules(model, rotary, ids[:-1], 0, begin)
    return _changed(whole, _by_rules(model, rotary, ids[-1:], len(ids) - 1, kept)[0], model)


def _changed_by_rules(model: Any, rotary: ModelRotary, ids: list[int], shapes: RecurrentShapes) -> str | None:
    """Name of what the rules change of the last token, beside the model's own recurrent layers; None: nothing."""
    own = _last_token(model, rotary, ids, 0, are_alone=False)
    return _changed(own, _by_rules(model, rotary, ids, 0, _begin(shapes))[0], model, OTHER_ORDER)


def _begin(shapes: RecurrentShapes) -> dict[int, LayerStates]:
    """States [1, ..] of a stream that begins."""
    return {
        layer: {key: torch.zeros(1, *state.shape, dtype=state.dtype) for key, state in states.items()}
        for layer, states in shapes.items()
    }


def _by_rules(
    model: Any, rotary: ModelRotary, ids: list[int], start: int, states: Mapping[int, LayerStates]
) -> tuple[Tensors, Mapping[int, LayerStates]]:
    """Tensors of the last of these tokens, whose first stands at `start`, and the states after it."""
    num_valid = None if len(ids) == 1 else torch.tensor([len(ids)])
    is_token = torch.ones(1, len(ids), dtype=torch.bool)
    recurrent = RecurrentStates(model, states, Tokens(is_token, num_valid, torch.tensor([start])))
    with torch.no_grad():
        return _last_token(model, rotary, ids, start, recurrent=recurrent), recurrent.after()


def _other_states(cache: Any) -> list[int]:
    """Layers that have put something else into a cache of `recurrent_cache` than recurrent states."""
    known, found = {f"{kind}_states" for kind in RECURRENT_KINDS}, []
    for layer, one in enumerate(cache.layers):
        values = [
            x
            for name, value in vars(one).items()
            if name not in known
            for x in (value.values() if isinstance(value, dict) else [value])
        ]
        if any(isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel() for x in values):
            found.append(layer)
    return found


def _last_token(
    model: Any,
    rotary: ModelRotary,
    ids: list[int],
    position: int,
    cache: Any | None = None,
    recurrent: RecurrentStates | None = None,
    beside: list[int] | None = None,
    *,
    are_alone: bool = True,
) -> Tensors:
    """Tensors of the last of these tokens, the first standing at `position`.

    Recurrent layers go on from `cache` as transformers computes them, or by their rules from `recurrent`. beside: as
    many tokens of another stream. are_alone: modules with a rule of their own see each token as a stream of its own.
    """
    found: Tensors = {}

    def attend(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **others: Any
    ) -> tuple[torch.Tensor, None]:
        seen = {name: x[0, :, -1] for name, x in ((QUERIES, q), ("keys", k), ("values", v))}
        seen |= {f"'{name}'": torch.as_tensor(others[name]) for name in OPTIONS if others.get(name) is not None}
        where = f"layer {layer_of(module)}"
        if f"{QUERIES} of {where}" in found:
            where += f", call {len(found)}"  # a layer may have several
        found.update({f"{name} of {where}": x.detach().double() for name, x in seen.items()})
        return own_values(q, v), None

    dtype = next(model.parameters()).dtype
    tokens = torch.tensor([ids] if beside is None else [ids, beside])
    positions = (position + torch.arange(len(ids))).expand(tokens.shape)
    if recurrent is not None:
        cache = recurrent.cache
    elif cache is None and are_alone:  # else transformers' own pass over a text, which needs none
        cache = recurrent_cache(model)
    with (
        torch.no_grad(),
        random_embeddings(model, 2 * NUM_BEFORE + 1),
        intercept_attention(model, attend),
        replaced_rotary(model, identity_rotary(rotary, len(tokens), len(ids), dtype)),
        _recurrent_layers(model, recurrent, are_alone=are_alone),
    ):
        given = with_cache(model, cache) if cache is not None else {}
        output = model(input_ids=tokens, position_ids=positions, use_cache=False, **given)
    found["logits"] = output.logits[0, -1:].double()
    return found


def _recurrent_layers(
    model: Any, recurrent: RecurrentStates | None, *, are_alone: bool
) -> contextlib.AbstractContextManager[None]:
    if recurrent is not None:
        return recurrent.in_place()
    return each_token_alone(model) if are_alone else contextlib.nullcontext()


def _changed(first: Tensors, second: Tensors, model: Any, slack: float = 1.0) -> str | None:
    """The first of these that differs by more than `slack` times what rounding explains; None: none does."""
    dtype = next(model.parameters()).dtype
    share = slack * max(1e-4, 16 * torch.finfo(dtype).eps)
    for name, wanted in first.items():
        if not bool(wanted.isfinite().all()):
            continue  # whoever computes with the model refuses it: nothing can be compared here
        error, size = float((second[name] - wanted).abs().max()), float(wanted.abs().max())
        if not error <= share * size:
            return name
    return None
