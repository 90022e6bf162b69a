"""Manifests of many layouts of states, made by hand or drawn at random: no graph and no model is behind them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import strategies as st
from sinkrt.contract import AttentionCache, FileFacts, Manifest, StateSpec, attention_entries

from tests.runtime.toy import Toy, toy_manifest

Raw = dict[str, Any]
Change = Callable[[list[Raw]], None]
"""Changes a list of states or of caches."""


@dataclasses.dataclass(frozen=True)
class CacheSizes:
    """A cache. window: W of a layer whose sliding window is smaller than S + W; None: the stream's."""

    cache: AttentionCache
    window: int | None = None
    is_int8: bool = False


@dataclasses.dataclass(frozen=True)
class Recurrent:
    """Recurrent states of a layer: number of each kind, each of the shape [B, *shape]."""

    layer: int
    conv: int
    recurrent: int
    shape: tuple[int, ...] = (3, 2)


def cache(
    layer: int, call: int = 0, *, heads: tuple[int, int] = (4, 2), dims: tuple[int, int] = (8, 8), latent: bool = False
) -> AttentionCache:
    """heads: of queries and of keys. dims: of keys and of values."""
    return AttentionCache(layer, call, *heads, *dims, latent=latent)


def layout(caches: Sequence[CacheSizes] = (), recurrent: Sequence[Recurrent] = (), toy: Toy | None = None) -> Manifest:
    """The manifest of these states in float32; `toy` has the model's heads and the stream. Layers are counted."""
    toy = toy or Toy()
    base = toy_manifest(toy, None, {"decode.onnx": FileFacts(1, "0" * 64), "prefill.onnx": FileFacts(1, "0" * 64)})
    layers = [sizes.cache.layer for sizes in caches] + [one.layer for one in recurrent]
    model = dataclasses.replace(base.model, num_layers=max(layers, default=0) + 1)
    if not caches:
        model = dataclasses.replace(model, num_q_heads=0, num_kv_heads=0, head_dim=0)
    states = [state for sizes in caches for state in cache_states(sizes, toy)]
    states += [state for one in recurrent for state in recurrent_states(one, toy)]
    entries = attention_entries(model, [sizes.cache for sizes in caches])
    return dataclasses.replace(base, model=model, states=tuple(states), attention=entries)


def cache_states(sizes: CacheSizes, toy: Toy) -> Iterator[StateSpec]:
    """The states of one cache, written down anew: independent of `sinkrt.contract.layout`."""
    cache, window = sizes.cache, sizes.window or toy.window_size
    suffix = f"{cache.layer}.call{cache.call}" if cache.call else str(cache.layer)
    head = (toy.batch, cache.num_kv_heads)
    parts = [("k", cache.key_dim)] if cache.latent else [("k", cache.key_dim), ("v", cache.value_dim)]
    if toy.num_sink_tokens and sizes.window is None:
        for part, dim in parts:
            shape = (*head, toy.num_sink_tokens, dim)
            yield state(cache.layer, f"sink_{part}", suffix, shape)
    for part, dim in parts:
        yield state(cache.layer, f"window_{part}", suffix, (*head, window, dim), "int8" if sizes.is_int8 else "float32")
        if sizes.is_int8:
            scales = "kv" if cache.latent else part  # a latent row's two parts have one each
            yield from (state(cache.layer, f"window_{one}_scale", suffix, (*head, window), "float16") for one in scales)


def recurrent_states(one: Recurrent, toy: Toy) -> Iterator[StateSpec]:
    """The recurrent states of a layer."""
    for kind, number in (("conv", one.conv), ("recurrent", one.recurrent)):
        for index in range(number):
            suffix = f"{one.layer}.{index}" if index else str(one.layer)
            yield state(one.layer, kind, suffix, (toy.batch, *one.shape))


def state(layer: int, kind: str, suffix: str, shape: tuple[int, ...], dtype: str = "float32") -> StateSpec:
    """A state of the name that the schema gives it."""
    return StateSpec(layer, kind, f"{kind}.{suffix}", f"{kind}.{suffix}.next", shape, dtype)


def examples() -> dict[str, Manifest]:
    """One layout of each kind that schema 7 brought, by name."""
    plain, wide = cache(0), cache(1, heads=(8, 4), dims=(8, 16))
    latent = cache(2, heads=(8, 1), dims=(12, 8), latent=True)
    return {
        "value heads of another size": layout([CacheSizes(cache(0, dims=(8, 16)))]),
        "heads by layer": layout([CacheSizes(plain), CacheSizes(wide, window=3), CacheSizes(cache(2, heads=(2, 1)))]),
        "latent": layout([CacheSizes(latent), CacheSizes(dataclasses.replace(latent, layer=3), is_int8=True)]),
        "two calls": layout(
            [CacheSizes(plain), CacheSizes(cache(0, 1)), CacheSizes(cache(1)), CacheSizes(cache(1, 2))]
        ),
        "a later call alone": layout([CacheSizes(cache(0, 1))]),
        "layers in turns": layout([CacheSizes(cache(n % 2, n // 2)) for n in range(4)]),
        "one kind of recurrence": layout([CacheSizes(plain)], [Recurrent(1, 1, 0), Recurrent(2, 0, 1)]),
        "several recurrent states": layout([], [Recurrent(0, 3, 1), Recurrent(2, 0, 11)]),
        "recurrence beside a cache": layout([CacheSizes(plain), CacheSizes(wide)], [Recurrent(0, 1, 1)]),
        "no attention": layout([], [Recurrent(0, 1, 1)], Toy(batch=3, chunk_size=4)),
        "no state at all": layout(),
    }


def faults(good: Manifest) -> Iterator[tuple[str, str]]:
    """(what was done to it, the text) of every single fault in states and `attention` of a good manifest.

    What nothing else in a manifest depends on is no fault: how many query heads share a key head, how much of a latent
    row is the value, the last of a layer's recurrent states, a latent layer's sinks.
    """
    raw: Raw = json.loads(good.to_json())
    for number in range(len(raw["states"])):
        for what, change in _state_faults(raw, number):
            yield what, _changed(raw, "states", change)
    entries = raw["attention"] or []
    for number, entry in enumerate(entries):
        for what, change in _entry_faults(entry, number):
            yield what, _changed(raw, "attention", change)
    caches = [dataclasses.asdict(one) for one in good.caches]
    more = dataclasses.asdict(cache(good.model.num_layers - 1, 12))
    for value in ([], None, [*caches, more]):
        if value != raw["attention"]:
            yield f"{value}", json.dumps({**raw, "attention": value})
    for name in ("num_q_heads", "num_kv_heads", "head_dim"):
        other = 0 if raw["model"][name] else 1
        yield f"model.{name} = {other}", json.dumps({**raw, "model": {**raw["model"], name: other}})
    if entries:
        for name, value in _variants(raw).items():
            yield f"{name} beside attention", json.dumps({**raw, name: value})


def _variants(raw: Raw) -> dict[str, Any]:
    layers, q_heads = raw["model"]["num_layers"], raw["model"]["num_q_heads"]
    return {
        "head_windows": [
            {"layer": one["layer"], "kv_heads": [*range(one["num_kv_heads"])], "window_size": 6}
            for one in raw["attention"]
        ],
        "sink_tuning": {"sha256": "0" * 64, "first_token_scale": [[1.5] * q_heads] * layers, "act": None},
        "affine_attention": {"sha256": "0" * 64, "file": "decode.onnx", "has_inputs": False, "heads": [[]] * layers},
    }


def _entry_faults(entry: Raw, number: int) -> Iterator[tuple[str, Change]]:
    """Changes of the list `attention`."""
    for name, value in entry.items():
        others: list[Any] = [0, -1, "x", None]
        if isinstance(value, bool):
            others = [not value]
        elif name not in ("num_q_heads", "value_dim") or (name == "value_dim" and not entry["latent"]):
            others += [value + 1, value - 1, 2 * value]
        for other in others:
            if other is not value:
                yield f"attention[{number}].{name} = {other!r}", _replaced(number, {**entry, name: other})

    def twice(items: list[Raw]) -> None:
        items.insert(number, entry)

    def first(items: list[Raw]) -> None:
        items.insert(0, items.pop(number))

    yield f"without attention[{number}]", _removed(number)
    yield f"attention[{number}] twice", twice
    if number:
        yield f"attention[{number}] first", first


def _state_faults(raw: Raw, number: int) -> Iterator[tuple[str, Change]]:
    """Changes of the list `states`."""
    one = raw["states"][number]
    name, kind, shape = one["input"], one["kind"], one["shape"]
    is_recurrent = kind in ("conv", "recurrent")
    names = [state["input"] for state in raw["states"]]
    is_last = is_recurrent and f"{kind}.{one['layer']}.{_index(name) + 1}" not in names
    is_latent = kind == "sink_k" and name.replace("_k", "_v") not in names
    if not is_last and not is_latent:
        yield f"without {name}", _removed(number)
    yield f"{name} twice", lambda states: states.append(one)
    ends = (".0", ".1", ".call0", ".call1", ".call01", ".call-1", "x", " ")
    for other in (*(name + end for end in ends), kind, f"{kind}.9", name.replace("_k", "_v")):
        if other != name:
            yield f"{name} as {other}", _replaced(number, {**one, "input": other, "output": f"{other}.next"})
    kinds = ("sink_k", "sink_v", "window_v", "window_k_scale", "attention_mass", "conv", "recurrent")
    changes: dict[str, Sequence[Any]] = {
        "layer": (one["layer"] + 1, raw["model"]["num_layers"], -1),
        "kind": kinds,
        "output": (f"{name}.Next",),
        "dtype": () if is_recurrent else ("float16", "int8"),
        "shape": [[], [shape[0] + 7, *shape[1:]]],
    }
    if not is_recurrent:
        axes = range(1, len(shape))
        changes["shape"] = [[*shape, 1], *([*shape[:i], shape[i] + 7, *shape[i + 1 :]] for i in axes)]
    for key, values in changes.items():
        for value in values:
            if value != one[key]:
                yield f"{name}: {key} {value}", _replaced(number, {**one, key: value})


def _index(name: str) -> int:
    """Number of a recurrent state among those of its layer and kind."""
    _, _, *index = name.split(".")
    return int(index[0]) if index else 0


def _replaced(number: int, value: Raw) -> Change:
    def change(items: list[Raw]) -> None:
        items[number] = value

    return change


def _removed(number: int) -> Change:
    def change(items: list[Raw]) -> None:
        del items[number]

    return change


def _changed(raw: Raw, name: str, change: Change) -> str:
    items = list(raw[name])
    change(items)
    return json.dumps({**raw, name: items})


@st.composite
def layouts(draw: st.DrawFn) -> Manifest:
    """Any layout that the schema allows, small."""
    small = st.integers(1, 3)
    toy = Toy(
        num_sink_tokens=draw(st.integers(0, 2)),
        window_size=draw(st.integers(2, 5)),
        batch=draw(st.integers(1, 2)),
        num_kv_heads=draw(small),
        num_q_heads=6,
        head_dim=draw(small),
    )
    calls = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 11)), unique=True, max_size=5))
    order = sorted(calls, key=lambda call: call[1])  # of a layer: calls ascend
    caches = []
    for number, (layer, call) in enumerate(order):
        latent, value_dim = draw(st.booleans()), draw(small)
        kv_heads = 1 if latent else draw(small)
        dims = (value_dim + draw(st.integers(0, 2)) if latent else draw(small), value_dim)
        one = cache(layer, call, heads=(kv_heads * draw(small), kv_heads), dims=dims, latent=latent)
        # A stream with sinks has one layer at least that keeps them.
        has_window = bool(number and draw(st.booleans()))
        caches.append(
            CacheSizes(one, draw(st.integers(1, toy.capacity - 1)) if has_window else None, draw(st.booleans()))
        )
    recurrent = [
        Recurrent(layer, *numbers, shape=tuple(draw(st.lists(small, max_size=3))))
        for layer in draw(st.lists(st.integers(0, 4), unique=True, max_size=3))
        if any(numbers := draw(st.tuples(st.integers(0, 3), st.integers(0, 3))))
    ]
    if not toy.num_sink_tokens:
        caches = [dataclasses.replace(one, window=one.window and min(one.window, toy.window_size)) for one in caches]
    return layout(caches, recurrent, toy)
