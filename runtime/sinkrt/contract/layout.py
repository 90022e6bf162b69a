"""Layout of a bundle's states: their kinds, their names, and the shape and dtype that each must have.

Standard library only. `Manifest` checks itself with `check_layout`, so that a manifest whose geometry and
states disagree is refused before a buffer is made of it. Twin of runtime/cpp/src/bundle/layout.cpp.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from sinkrt.contract.constants import MASS_KIND, RECURRENT_KINDS, SCALE_KINDS, STATE_KINDS
from sinkrt.errors import BundleError, problem

if TYPE_CHECKING:
    from sinkrt.contract.manifest import Manifest
    from sinkrt.contract.schema import GraphSpec, StateSpec


@dataclasses.dataclass(frozen=True)
class _Cache:
    """Where the states of one cache belong: all key heads of a layer, or those of one group (``head_windows``)."""

    layer: int
    group: int | None
    num_kv_heads: int
    window_size: int | None

    @property
    def suffix(self) -> str:
        return f"{self.layer}" if self.group is None else f"{self.layer}.{self.group}"


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
    layer's sliding window is smaller than S + W. An int8 window has scales, [B, Hkv, W]. Names are ``<kind>.<layer>``
    or ``<kind>.<layer>.<group>``; what comes out of the graph has ``.next`` behind the name.

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
    expected: set[str] = set()
    for layer in sorted({state.layer for state in manifest.states}):
        kinds = {state.kind for state in manifest.states if state.layer == layer}
        if kinds & set(RECURRENT_KINDS):
            expected |= _check_recurrent(manifest, layer, by_name)
        if kinds - set(RECURRENT_KINDS):
            for cache in _caches(manifest, layer):
                expected |= _check_cache(manifest, cache, by_name)
    kinds = {state.kind for state in manifest.states}
    if manifest.stream.num_sink_tokens and kinds & set(STATE_KINDS) and not kinds & set(STATE_KINDS[:2]):
        _refuse("stream.num_sink_tokens", manifest.stream.num_sink_tokens, "0: no layer keeps sinks")
    for name in by_name:
        if name not in expected:
            _refuse("states", f"'{name}'", "names of the form <kind>.<layer>, one for each state of a layer")


def _caches(manifest: Manifest, layer: int) -> Sequence[_Cache]:
    groups = [group for group in manifest.head_windows or () if group.layer == layer]
    if len(groups) < 2:
        window = groups[0].window_size if groups else None
        return [_Cache(layer, None, manifest.model.num_kv_heads, window)]
    return [_Cache(layer, number, len(group.kv_heads), group.window_size) for number, group in enumerate(groups)]


def _check_cache(manifest: Manifest, cache: _Cache, by_name: Mapping[str, StateSpec]) -> set[str]:
    """The states of one cache. Returns their names."""
    stream, model = manifest.stream, manifest.model
    head = (stream.batch, cache.num_kv_heads)
    window = by_name.get(f"window_k.{cache.suffix}")
    if window is None:
        _refuse(f"states of layer {cache.layer}", f"no 'window_k.{cache.suffix}'", "keys of the window in each cache")
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
    float_dtype = manifest.weights_dtype if manifest.plugin_abi is None else "float16"  # the plugin's, always
    rows: tuple[tuple[int, ...], str] = ((*head, length, model.head_dim), "int8" if is_int8 else float_dtype)
    wanted_states = dict.fromkeys(("window_k", "window_v"), rows)
    if has_sinks:
        sinks = ((*head, stream.num_sink_tokens, model.head_dim), float_dtype)
        wanted_states |= dict.fromkeys(("sink_k", "sink_v"), sinks)
    if is_int8:
        wanted_states |= dict.fromkeys(SCALE_KINDS, ((*head, length), "float16"))
    mass = f"{MASS_KIND}.{cache.suffix}"
    if mass in by_name:
        q_heads = cache.num_kv_heads * (model.num_q_heads // model.num_kv_heads)
        wanted_states[MASS_KIND] = ((stream.batch, q_heads, 2, length), "float32")
    for kind, (shape, dtype) in wanted_states.items():
        _check_state(by_name.get(f"{kind}.{cache.suffix}"), f"{kind}.{cache.suffix}", kind, shape, dtype)
    return {f"{kind}.{cache.suffix}" for kind in wanted_states}


def _check_state(state: StateSpec | None, name: str, kind: str, shape: tuple[int, ...], dtype: str) -> None:
    if state is None:
        _refuse("states", f"no '{name}'", "every state of a cache")
    if state.kind != kind:
        _refuse(f"kind of state '{name}'", state.kind, kind)
    if (state.shape, state.dtype) != (shape, dtype):
        _refuse(f"state '{name}'", f"{state.dtype} {list(state.shape)}", f"{dtype} {list(shape)}")


def _check_recurrent(manifest: Manifest, layer: int, by_name: Mapping[str, StateSpec]) -> set[str]:
    """The states of linear attention: any shape, one row for each stream."""
    names = set()
    for kind in RECURRENT_KINDS:
        name = f"{kind}.{layer}"
        state = by_name.get(name)
        if state is None:
            _refuse("states", f"no '{name}'", "both states of linear attention")
        if state.kind != kind:
            _refuse(f"kind of state '{name}'", state.kind, kind)
        if not state.shape or state.shape[0] != manifest.stream.batch:
            _refuse(f"streams of state '{name}'", list(state.shape)[:1], f"batch={manifest.stream.batch} first")
        names.add(name)
    return names


def _refuse(what: str, received: object, expected: str) -> NoReturn:
    raise BundleError(problem(what, received=received, expected=expected, fix="export the model again"))
