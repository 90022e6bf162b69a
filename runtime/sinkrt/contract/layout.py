"""Layout of a bundle's states: their kinds, their names, and the shape and dtype that each must have.

Standard library only. `Manifest` checks itself with `check_layout`, so that a manifest whose geometry and
states disagree is refused before a buffer is made of it. Twin of runtime/cpp/src/bundle/layout.cpp.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn, Protocol

from sinkrt.contract.constants import MASS_KIND, RECURRENT_KINDS, STATE_KINDS
from sinkrt.contract.schema import AttentionCache
from sinkrt.errors import BundleError, problem

if TYPE_CHECKING:
    from sinkrt.contract.manifest import Manifest
    from sinkrt.contract.schema import GraphSpec, ModelFacts, StateSpec

WINDOW_KEYS = STATE_KINDS[2]
"""Kind of the one state that every cache has."""


class Heads(Protocol):
    """Sizes of a model's attention: of `ModelFacts`, and what an exporter finds before there is a manifest."""

    @property
    def num_q_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class _Cache:
    """Where the states of one cache belong: all key heads of a call, or those of one group (``head_windows``)."""

    suffix: str
    sizes: AttentionCache
    num_kv_heads: int
    window_size: int | None


def attention_entries(model: Heads, caches: Sequence[AttentionCache]) -> tuple[AttentionCache, ...] | None:
    """Return `Manifest.attention` for these caches: None if each is its layer's only one, of the model's sizes."""
    if model.num_q_heads == 0:
        return tuple(caches)
    is_uniform = len({cache.layer for cache in caches}) == len(caches) and all(
        cache == model_cache(model, cache.layer) for cache in caches
    )
    return None if is_uniform else tuple(caches)


def layout_text(
    model: ModelFacts, num_sink_tokens: int, window_size: int, caches: Sequence[AttentionCache] | None
) -> str | None:
    """Return what a graph's metadata say of its sizes (`LAYOUT_METADATA`); None: nothing.

    caches: `Manifest.attention`.
    """
    if caches is None:
        return None
    names = ("num_layers", "num_q_heads", "num_kv_heads", "head_dim")
    facts = {
        **{name: getattr(model, name) for name in names},
        "num_sink_tokens": num_sink_tokens,
        "window_size": window_size,
        "attention": [dataclasses.asdict(cache) for cache in caches],
    }
    return json.dumps(facts, sort_keys=True)


def graph_layout(manifest: Manifest) -> str | None:
    """Return what the metadata of each graph must say (`LAYOUT_METADATA`); None: nothing."""
    stream = manifest.stream
    return layout_text(manifest.model, stream.num_sink_tokens, stream.window_size, manifest.attention)


def model_cache(model: Heads, layer: int) -> AttentionCache:
    """Return the cache of a layer that has the model's heads and `head_dim`."""
    heads = (model.num_q_heads, model.num_kv_heads, model.head_dim, model.head_dim)
    return AttentionCache(layer, 0, *heads, latent=False)


def uniform_caches(manifest: Manifest) -> tuple[AttentionCache, ...]:
    """Sizes of the caches if each is the one of its layer and has the model's heads, in the order of the states."""
    layers = dict.fromkeys(state.layer for state in manifest.states if state.kind not in RECURRENT_KINDS)
    return tuple(model_cache(manifest.model, layer) for layer in layers)


def check_layout(manifest: Manifest) -> None:
    """Compare states and graphs with the geometry that the manifest announces.

    Raises: BundleError naming the first that disagrees.
    """
    _check_states(manifest)
    for role, batch, num_tokens in (("decode", manifest.stream.batch, 1), ("prefill", 1, manifest.stream.chunk_size)):
        if role in manifest.graphs:
            _check_graph(manifest.graphs[role], role, batch, num_tokens, manifest.model.vocab_size)


def _check_graph(graph: GraphSpec, role: str, batch: int, num_tokens: int, vocab_size: int) -> None:
    """ids [B, T] and position [B, ..] in, logits float32 [B, vocab] out."""
    if graph.num_tokens != num_tokens:
        _refuse(f"num_tokens of graph '{role}'", graph.num_tokens, f"{num_tokens}, as stream says")
    shapes = {spec.name: spec.shape for spec in graph.inputs}
    if shapes.get("ids") != (batch, num_tokens):
        _refuse(f"ids of graph '{role}'", list(shapes.get("ids", ())), str([batch, num_tokens]))
    if shapes.get("position", ())[:1] != (batch,):
        _refuse(f"position of graph '{role}'", list(shapes.get("position", ())), f"[{batch}]")
    logits = [(spec.name, spec.shape, spec.dtype) for spec in graph.outputs]
    if logits != [("logits", (batch, vocab_size), "float32")]:
        _refuse(f"outputs of graph '{role}'", logits, f"logits float32 [{batch}, {vocab_size}] alone")


def _check_states(manifest: Manifest) -> None:
    """Compare every state with the geometry that the manifest announces.

    Each cache has keys and values of the window, [B, Hkv, W, D]. It has sinks, [B, Hkv, S, D], unless S = 0 or the
    layer's sliding window is smaller than S + W. An int8 window has scales, [B, Hkv, W]. A latent cache has keys alone.
    Names are ``<kind>.<layer>``, or ``<kind>.<layer>.call<k>`` of a layer's later calls, or ``<kind>.<layer>.<group>``.
    Recurrent states are ``<kind>.<layer>`` and ``<kind>.<layer>.<index>``. What comes out of the graph has ``.next``
    behind the name.

    Raises: BundleError naming the first state that disagrees.
    """
    by_name: dict[str, StateSpec] = {}
    for state in manifest.states:
        if state.input in by_name:
            _refuse(f"state '{state.input}'", "the name twice", "a name of its own")
        if state.layer >= manifest.model.num_layers:
            _refuse(f"layer of state '{state.input}'", state.layer, f"below num_layers={manifest.model.num_layers}")
        if state.output != f"{state.input}.next":
            _refuse(f"output of state '{state.input}'", f"'{state.output}'", f"'{state.input}.next'")
        by_name[state.input] = state
    if manifest.attention is not None:
        _check_order(manifest, manifest.attention)
    expected = _check_recurrent(manifest, by_name)
    for sizes in manifest.caches:
        for cache in _groups(manifest, sizes):
            expected |= _check_cache(manifest, cache, by_name)
    kinds = {state.kind for state in manifest.states}
    if manifest.stream.num_sink_tokens and kinds & set(STATE_KINDS) and not kinds & set(STATE_KINDS[:2]):
        _refuse("stream.num_sink_tokens", manifest.stream.num_sink_tokens, "0: no layer keeps sinks")
    for name in by_name:
        if name not in expected:
            _refuse("states", f"'{name}'", "names of the form <kind>.<layer>, one for each state of a layer")


def _check_order(manifest: Manifest, caches: Sequence[AttentionCache]) -> None:
    """Compare the caches of `attention` with those that have states, one by one; calls of a layer must ascend."""
    found = [state.input for state in manifest.states if state.kind == WINDOW_KEYS]
    last_calls: dict[int, int] = {}
    for number, (cache, name) in enumerate(itertools.zip_longest(caches, found)):
        wanted = "no more" if cache is None else f"'{WINDOW_KEYS}.{cache.suffix}'"
        if cache is None or name != f"{WINDOW_KEYS}.{cache.suffix}":
            _refuse(f"attention[{number}]", wanted, "no more caches" if name is None else f"'{name}', as states say")
        if cache.call <= last_calls.get(cache.layer, -1):
            _refuse(f"attention[{number}].call", cache.call, f"above {last_calls[cache.layer]}, the layer's last")
        last_calls[cache.layer] = cache.call


def _groups(manifest: Manifest, sizes: AttentionCache) -> Sequence[_Cache]:
    """The caches of one call: one, or one for each group of its key heads."""
    groups = [group for group in manifest.head_windows or () if group.layer == sizes.layer]
    if len(groups) < 2:
        window = groups[0].window_size if groups else None
        return [_Cache(sizes.suffix, sizes, sizes.num_kv_heads, window)]
    return [
        _Cache(f"{sizes.suffix}.{number}", sizes, len(group.kv_heads), group.window_size)
        for number, group in enumerate(groups)
    ]


def _check_cache(manifest: Manifest, cache: _Cache, by_name: Mapping[str, StateSpec]) -> set[str]:
    """The states of one cache. Returns their names."""
    stream, sizes = manifest.stream, cache.sizes
    head = (stream.batch, cache.num_kv_heads)
    window = by_name.get(f"{WINDOW_KEYS}.{cache.suffix}")
    if window is None:
        _refuse(f"states of layer {sizes.layer}", f"no 'window_k.{cache.suffix}'", "keys of the window in each cache")
    has_sinks = f"sink_k.{cache.suffix}" in by_name
    length = window.shape[2] if len(window.shape) == 4 else 0  # 0: its shape is refused below
    longest = cache.window_size or stream.window_size
    if has_sinks or cache.window_size is not None or not stream.num_sink_tokens:
        lengths = (longest, longest) if has_sinks or cache.window_size is not None else (1, longest)
    else:  # a sliding window shorter than S + W
        lengths = (1, stream.capacity - 1)
    if length and not lengths[0] <= length <= lengths[1]:
        wanted = str(longest) if lengths[0] == lengths[1] else f"{lengths[0]} .. {lengths[1]}"
        _refuse(f"tokens of state '{window.input}'", length, f"{wanted}, as stream and head_windows say")
    is_int8 = window.dtype == "int8"
    float_dtype = "float16" if manifest.has_tensorrt_plugin else manifest.weights_dtype  # the plugin's, always
    wanted_states: dict[str, tuple[tuple[int, ...], str]] = {}
    for part, dim in zip("kv", (sizes.key_dim, 0 if sizes.latent else sizes.value_dim), strict=True):
        if is_int8:
            wanted_states[f"window_{part}_scale"] = (*head, length), "float16"
        if not dim:
            continue
        wanted_states[f"window_{part}"] = (*head, length, dim), "int8" if is_int8 else float_dtype
        if has_sinks:
            wanted_states[f"sink_{part}"] = (*head, stream.num_sink_tokens, dim), float_dtype
    if manifest.attention is None and f"{MASS_KIND}.{cache.suffix}" in by_name:
        q_heads = cache.num_kv_heads * (sizes.num_q_heads // sizes.num_kv_heads)
        wanted_states[MASS_KIND] = (stream.batch, q_heads, 2, length), "float32"
    for kind, (shape, dtype) in wanted_states.items():
        state = _named(by_name, f"{kind}.{cache.suffix}", kind, sizes.layer)
        if (state.shape, state.dtype) != (shape, dtype):
            _refuse(f"state '{state.input}'", f"{state.dtype} {list(state.shape)}", f"{dtype} {list(shape)}")
    return {f"{kind}.{cache.suffix}" for kind in wanted_states}


def _check_recurrent(manifest: Manifest, by_name: Mapping[str, StateSpec]) -> set[str]:
    """The recurrent states: of any shape, one row for each stream, numbered without gaps. Returns their names."""
    numbers = collections.Counter((s.layer, s.kind) for s in manifest.states if s.kind in RECURRENT_KINDS)
    names = {
        f"{kind}.{layer}.{index}" if index else f"{kind}.{layer}": (layer, kind)
        for (layer, kind), number in sorted(numbers.items())
        for index in range(number)
    }
    for name, (layer, kind) in names.items():
        state = _named(by_name, name, kind, layer)
        if state.shape[:1] != (manifest.stream.batch,):
            _refuse(f"streams of state '{name}'", list(state.shape)[:1], f"batch={manifest.stream.batch} first")
    return set(names)


def _named(by_name: Mapping[str, StateSpec], name: str, kind: str, layer: int) -> StateSpec:
    """The state of this name, whose kind and layer must be those that the name says."""
    state = by_name.get(name)
    if state is None:
        _refuse("states", f"no '{name}'", "every state of a cache, and recurrent states numbered from 0")
    if (state.kind, state.layer) != (kind, layer):
        _refuse(f"state '{name}'", f"{state.kind} of layer {state.layer}", f"{kind} of layer {layer}")
    return state


def _refuse(what: str, received: object, expected: str) -> NoReturn:
    raise BundleError(problem(what, received=received, expected=expected, fix="export the model again"))
