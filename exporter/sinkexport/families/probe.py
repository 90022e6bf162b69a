"""Attention and rotation of a model: read off the model itself, never assumed.

Families' rotary code differs: in which numbers form a pair (halves or neighbours), in how many dimensions turn, in the
layout of cos and sin and in which layers share them. Instead of a table of families, `probe_attention` runs the model
twice on the same few tokens: once they see no rotation (cos = 1, sin = 0), once known ones. What the attention function
receives shows shapes and layout, call by call. Queries and keys must both be turned, and nothing else: a norm between
rotation and attention or a layout that is not recognised is refused, so a guess can never reach a bundle.

Tokens are random vectors in the place of embeddings, and every dimension is compared on its own scale: neither a row of
zeros nor a tiny one can hide what a layer does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sinkrt.errors import UsageError, problem

from sinkexport.families.adapters import find_adapter
from sinkexport.families.indexers import refuse_small_indexes
from sinkexport.families.interface import intercept_attention, layer_of, own_values, random_embeddings, refuse_arguments
from sinkexport.families.latent import Latent, find_latents
from sinkexport.families.layout import NoLayoutError, find_layout, is_close
from sinkexport.families.locality import query_scales, refuse_other_states
from sinkexport.families.masks import MaskRecorder
from sinkexport.families.recurrent import recorded_owners, recurrent_cache, recurrent_shapes, with_cache
from sinkexport.families.refusals import refusing
from sinkexport.families.rope import (
    ModelRotary,
    Replacements,
    RotarySpec,
    RotaryTable,
    handed_out,
    identity_rotary,
    probe_table,
    refused_rotary,
    replaced_rotary,
    rotary_modules,
    table_names,
)
from sinkexport.families.shape import AttentionCall, AttentionShape
from sinkexport.families.shared_keys import Copies, many_tokens, shared_keys
from sinkexport.families.weights_after import WEIGHT, norms_of_calls, without_weights
from sinkexport.recurrent.registry import each_token_alone, refuse_unknown

KNOWN_ARGUMENTS = ("scaling", "softcap", "s_aux")
"""Arguments of an attention function that the traced one takes, whatever their values."""

NUM_TOKENS = 4
"""Tokens that the probe looks at: enough that a head is hardly zero at all of them."""


def probe_attention(model: torch.nn.Module, num_layers: int, capacity: int = 1) -> tuple[AttentionShape, ModelRotary]:
    """Find out the shapes of a model's attention and how it rotates queries and keys.

    capacity: tokens that the cache will hold. Where the model makes its frequencies depend on the length of a text
    (longrope, arXiv:2402.13753; dynamic NTK), they are those of a text of this length.

    Raises: UsageError for heads of unknown shapes; for an unknown layout of cos/sin or of the rotation; if queries and
        keys are not turned alike; if a layer masks more than a window; if anything but attention and known linear
        layers carries something from token to token.
    """
    with refusing(model, "probing its attention"):
        refuse_small_indexes(model, capacity)
        tables = _probe_tables(model, capacity)
        # Angles of each table differ, so that a layer's rotation shows its table; those of tokens differ too.
        angles = {
            key: torch.linspace(0.3 + 0.2 * i, 2.7 + 0.2 * i, table.frequency.numel(), dtype=torch.float64)
            + 0.4 * torch.arange(NUM_TOKENS, dtype=torch.float64)[:, None]  # [T, R/2]
            for i, (key, table) in enumerate(tables.items())
        }
        still = ModelRotary(tables=tables, calls=())
        dtype = next(model.parameters()).dtype
        masks, cache, identity = MaskRecorder(), recurrent_cache(model), identity_rotary(still, 1, NUM_TOKENS, dtype)
        with recorded_owners(model, cache) as owners:
            plain = _run(model, identity, num_layers, cache, masks)
        refuse_unknown(owners)
        turned = _run(model, _handed(tables, angles, dtype), num_layers, recurrent_cache(model), None)
        if [one.place for one in plain.seen] != [one.place for one in turned.seen]:
            raise _refused("other calls of attention in each run", "the same in every run")
        if plain.may_have_latents:
            latents = find_latents(model, *many_tokens(model, still), recurrent_cache(model))
            plain, turned = plain.with_latents(latents), turned.with_latents(latents)
        calls = _layouts(model, plain, turned, still, angles)
        # Of logits that are not finite nothing can be said here: whoever computes with the model refuses them.
        if bool(plain.logits.isfinite().all()) and not is_close(turned.logits, plain.logits, dtype):
            raise refused_rotary("a use of cos and sin outside attention", "queries and keys alone")
        copies = plain.copies & turned.copies
        if copies.calls or any(one.k.shape[0] > n for one, n in zip(plain.seen, copies.heads, strict=True)):
            copies &= shared_keys(model, *many_tokens(model, still), recurrent_cache(model))
        shape = AttentionShape(num_layers, _calls(plain, copies), recurrent_shapes(model, cache))
        masks.check(
            [(one.layer, one.mask, one.sliding_window) for one in plain.seen],
            capacity,
            adapted=find_adapter(model) is not None,
        )
        rotary = ModelRotary(tables=tables, calls=calls)
        alone = refuse_other_states(model, rotary)
        scales = query_scales(model, rotary, capacity, alone)
    return shape, dataclasses.replace(rotary, query_scales=scales)


def _probe_tables(model: torch.nn.Module, capacity: int) -> dict[str, RotaryTable]:
    """The sets of frequencies of the rotary embeddings that a model uses."""
    modules = rotary_modules(model)
    if len(modules) > 1:  # those of another modality, or left over from a base class, do not matter
        modules = _used(model, modules)
    tables: dict[str, RotaryTable] = {}
    for number, (name, module) in enumerate(modules.items()):
        for layer_type in table_names(module):
            key = layer_type if len(modules) == 1 else "_".join((str(number), layer_type)).rstrip("_")
            tables[key] = probe_table(module, name, layer_type, capacity)
    return tables


def _used(model: Any, modules: Mapping[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
    """Those of these modules that a pass over text calls."""
    used: set[torch.nn.Module] = set()
    hooks = [module.register_forward_hook(lambda module, *_: used.add(module)) for module in modules.values()]
    places = torch.arange(NUM_TOKENS)[None]
    ids = places % model.config.get_text_config().vocab_size
    try:
        with (
            torch.no_grad(),
            intercept_attention(model, lambda _m, q, _k, v, *_, **__: (own_values(q, v), None)),
            each_token_alone(model),
        ):
            model(input_ids=ids, position_ids=places, use_cache=False, **with_cache(model, recurrent_cache(model)))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: module for name, module in modules.items() if module in used}


def _handed(tables: Mapping[str, RotaryTable], angles: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Replacements:
    """Rotary embeddings of these angles [T, R/2] for T tokens, cos and sin scaled as the model's own are."""
    scaled = {name: (a.cos() * tables[name].scaling, a.sin() * tables[name].scaling) for name, a in angles.items()}
    return handed_out(tables, {name: (cos.to(dtype)[None], sin.to(dtype)[None]) for name, (cos, sin) in scaled.items()})


def _layouts(
    model: torch.nn.Module, plain: _Run, turned: _Run, still: ModelRotary, angles: Mapping[str, torch.Tensor]
) -> tuple[RotarySpec, ...]:
    """The rotation of each call; of those with a weight after it, that of what the weight multiplies."""
    dtype, specs, failed = next(model.parameters()).dtype, dict[int, RotarySpec](), dict[int, NoLayoutError]()
    for i, (before, after) in enumerate(zip(plain.seen, turned.seen, strict=True)):
        try:
            specs[i] = find_layout(before, after, still.tables, angles, dtype)
        except NoLayoutError as error:
            failed[i] = error
    if failed:
        specs |= _layouts_before_weights(model, plain, failed, still, angles)
    return tuple(specs[i] for i in range(len(plain.seen)))


def _layouts_before_weights(
    model: torch.nn.Module,
    plain: _Run,
    failed: Mapping[int, NoLayoutError],
    still: ModelRotary,
    angles: Mapping[str, torch.Tensor],
) -> dict[int, RotarySpec]:
    """The rotation of calls whose queries and keys are one but for the weights of the norms that made them.

    Raises: UsageError if there is no such norm, or if it does anything else.
    """
    dtype, num_layers = next(model.parameters()).dtype, 1 + max(one.layer for one in plain.seen)
    identity = identity_rotary(still, 1, NUM_TOKENS, dtype)
    norms = norms_of_calls(model, identity, NUM_TOKENS, recurrent_cache(model))
    if len(norms) != len(plain.seen) or any(len(norms[i]) != 2 for i in failed):
        raise next(iter(failed.values())).refusal
    with without_weights(model, (name for i in failed for name in norms[i])):
        before, after = (
            _run(model, rotary, num_layers, recurrent_cache(model), None)
            for rotary in (identity, _handed(still.tables, angles, dtype))
        )
    specs = {}
    for i, error in failed.items():
        try:
            spec = find_layout(before.seen[i], after.seen[i], still.tables, angles, dtype)
        except NoLayoutError:
            raise error.refusal from None
        weights = [model.get_submodule(name).get_parameter(WEIGHT).double() for name in norms[i]]
        with_weights = before.seen[i].q * weights[0], before.seen[i].k * weights[1]
        pairs = zip(with_weights, (plain.seen[i].q, plain.seen[i].k), strict=True)
        if not spec.rotary_dim or not all(is_close(x, y, dtype) for x, y in pairs):
            raise error.refusal
        specs[i] = dataclasses.replace(spec, norms=tuple(norms[i]))
    return specs


@dataclasses.dataclass(frozen=True)
class _Seen:
    """Inputs of one call of the attention function: q [Hq, T, Dk], k [Hkv, T, Dk] and v [Hkv, T, Dv], float64.

    number: of the calls of its layer. mask: what else it was given for a mask. latent: what makes the keys and values,
    if they are expanded; what turns leads then in q and k, wherever the layer has it.
    """

    layer: int
    number: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sliding_window: int | None
    alibi_slopes: tuple[float, ...] | None
    mask: Any
    latent: Latent | None = None

    @property
    def place(self) -> tuple[int, int]:
        """Layer and number."""
        return self.layer, self.number


@dataclasses.dataclass(frozen=True)
class _Run:
    """One run. seen: the calls, in their order. logits: [T, vocab], float64."""

    seen: Sequence[_Seen]
    logits: torch.Tensor

    @property
    def may_have_latents(self) -> bool:
        """Whether there are calls in which every query head has keys and values of its own."""
        return any(one.q.shape[0] == one.k.shape[0] > 1 for one in self.seen)

    @property
    def copies(self) -> Copies:
        """Keys and values that are the same."""
        return Copies.of([(one.k, one.v) for one in self.seen])

    def with_latents(self, latents: Sequence[Latent | None]) -> _Run:
        """The same with what was found of each call; empty: nothing was."""
        if len(latents) != len(self.seen):
            return self
        return dataclasses.replace(
            self,
            seen=[
                one
                if latent is None
                else dataclasses.replace(
                    one, latent=latent, q=latent.rotary_part_first(one.q), k=latent.rotary_part_first(one.k)
                )
                for one, latent in zip(self.seen, latents, strict=True)
            ],
        )


def _run(
    model: torch.nn.Module, rotary: Replacements, num_layers: int, cache: Any | None, masks: MaskRecorder | None
) -> _Run:
    """Run the model with `rotary` and record the inputs of each attention. Each token's output is its own value.

    Raises: UsageError for shapes of no plain attention.
    """
    seen: list[_Seen] = []

    def record(
        module: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attention_mask: Any = None,
        *_: Any,
        sliding_window: int | None = None,
        alibi_slopes: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        layer = layer_of(module)
        if not 0 <= layer < num_layers:
            raise _refused(f"a call in layer {layer} of {num_layers}", "calls in the model's own layers")
        _check_shapes(layer, q, k, v)
        if position_bias is not None:
            raise _refused(
                f"a bias that each token computes for every distance, in layer {layer}",
                "rotary or ALiBi positions, or none",
            )
        refuse_arguments(layer, {name: value for name, value in others.items() if name not in KNOWN_ARGUMENTS})
        slopes = None if alibi_slopes is None else tuple(alibi_slopes.tolist())
        one = _Seen(
            layer=layer,
            number=sum(before.layer == layer for before in seen),
            q=q[0].double(),
            k=k[0].double(),
            v=v[0].double(),
            sliding_window=sliding_window,
            alibi_slopes=slopes,
            mask=attention_mask,
        )
        seen.append(one)
        return own_values(q, v), None

    ids = torch.arange(NUM_TOKENS)[None]
    with (
        torch.no_grad(),
        random_embeddings(model, NUM_TOKENS),
        intercept_attention(model, record, masks),
        replaced_rotary(model, rotary),
        each_token_alone(model),
    ):
        # Positions in a row, or transformers would take the tokens for those of several texts.
        output = model(input_ids=ids, position_ids=ids, use_cache=False, **with_cache(model, cache))
    for one in seen:
        for name, x in (("queries", one.q), ("keys", one.k)):
            if not bool(x.isfinite().all()):
                raise _refused(f"{name} that are not finite in layer {one.layer}", "finite numbers")
            if not bool(x.any()):
                raise _refused(
                    f"{name} that are all zero in layer {one.layer}, which hide its rotation",
                    "weights that are not zero",
                )
    return _Run(seen, output.logits[0].double())


def _check_shapes(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    shapes = [tuple(x.shape) for x in (q, k, v)]
    is_plain = (
        all(len(shape) == 4 and shape[2] == NUM_TOKENS for shape in shapes)
        and q.shape[3] == k.shape[3]
        and all(q.shape[1] % heads == 0 for heads in (k.shape[1], v.shape[1]))
        and max(k.shape[1], v.shape[1]) % min(k.shape[1], v.shape[1]) == 0
    )
    if not is_plain:
        raise _refused(
            f"queries, keys and values of shapes {shapes} for {NUM_TOKENS} tokens in layer {layer}",
            "[B, H, T, D], queries as long as keys, their number a multiple of those of key and of value heads",
        )


def _calls(plain: _Run, copies: Copies) -> tuple[AttentionCall, ...]:
    """Sizes of each call, and which calls or heads read the keys and values of others."""
    calls: list[AttentionCall] = []
    for i, one in enumerate(plain.seen):
        same = (j for j in range(i) if (i, j) in copies.calls)
        shares = next((j for j in same if calls[j].sliding_window == one.sliding_window), None)
        if one.alibi_slopes != plain.seen[0].alibi_slopes:
            raise _refused(f"other ALiBi slopes in layer {one.layer} than in layer 0", "the same in all layers")
        num_kv_heads = max(one.k.shape[0], one.v.shape[0])
        is_tiled = copies.heads[i] < num_kv_heads == one.q.shape[0] and one.latent is None
        calls.append(
            AttentionCall(
                layer=one.layer,
                number=one.number,
                num_q_heads=one.q.shape[0],
                num_kv_heads=copies.heads[i] if is_tiled else num_kv_heads,
                key_dim=one.k.shape[2],
                value_dim=one.v.shape[2],
                sliding_window=one.sliding_window,
                alibi_slopes=one.alibi_slopes,
                is_tiled=is_tiled,
                shares=shares,
                latent=one.latent,
            )
        )
    return tuple(calls)


def _refused(received: str, expected: str) -> UsageError:
    return UsageError(
        problem("attention", received=received, expected=expected, fix="this model cannot be exported exactly")
    )
