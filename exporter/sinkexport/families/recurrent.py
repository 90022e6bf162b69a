"""Which layers of a model have recurrent states: those that put some into transformers' own cache, or have a rule.

All states are zero where a stream begins.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from sinkrt.contract import RECURRENT_KINDS

from sinkexport.recurrent import mamba2
from sinkexport.recurrent.registry import module_shapes
from sinkexport.recurrent.rules import replaced_functions
from sinkexport.recurrent.states import FixedState, RecurrentShapes, StateKey, state_of

CACHE_ARGUMENTS = ("cache", "cache_params", "past_key_values")
"""Names that models give their cache, the first since transformers 5.24."""


def recurrent_cache(model: Any) -> Any | None:
    """transformers' own cache for recurrent layers, into which softmax attention puts nothing; None: it has none.

    The cache may still be empty after a run: then no layer has put a state into it.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    class RecurrentCache(DynamicCache):
        def update(self, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return k, v

        def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
            return 0  # the positions are given

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # noqa: ARG002
            return query_length, 0

    try:
        cache = RecurrentCache(config=model.config.get_text_config())
    except (AttributeError, KeyError, TypeError, ValueError):  # layers that the cache knows nothing of
        return None
    return cache if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers) else None


def layers_without_attention(model: Any) -> frozenset[int]:
    """Layers without keys in transformers' cache: they have recurrent states only, or nothing."""
    from transformers.cache_utils import CacheLayerMixin

    cache = recurrent_cache(model)
    layers = () if cache is None else cache.layers
    return frozenset(i for i, layer in enumerate(layers) if not isinstance(layer, CacheLayerMixin))


def cached_states(cache: Any | None) -> dict[int, dict[StateKey, torch.Tensor]]:
    """States [B, ..] that layers have put into a cache of `recurrent_cache`."""
    found: dict[int, dict[StateKey, torch.Tensor]] = {}
    for layer, one in enumerate(() if cache is None else cache.layers):
        for kind in RECURRENT_KINDS:
            for index, state in getattr(one, f"{kind}_states", {}).items():
                if state is not None:
                    found.setdefault(layer, {})[kind, index] = state
    return found


def recurrent_shapes(model: Any, cache: Any | None) -> RecurrentShapes:
    """Shapes of what recurrent layers have put into a cache of `recurrent_cache`, and of modules with a rule."""
    dtype = next(model.parameters()).dtype
    shapes: dict[int, dict[StateKey, FixedState]] = {
        layer: {key: state_of(key[0], tuple(state.shape[1:]), dtype) for key, state in states.items()}
        for layer, states in cached_states(cache).items()
    }
    for layer, states in module_shapes(model).items():
        own = shapes.setdefault(layer, {})
        if own.keys() & states.keys():
            raise RuntimeError(f"layer {layer} has two states of one name")
        own.update(states)
    return dict(sorted(shapes.items()))


def with_cache(model: Any, cache: Any | None) -> dict[str, Any]:
    """Arguments that hand a cache to a model: some families call it otherwise."""
    named = inspect.signature(model.forward).parameters
    return {next((name for name in CACHE_ARGUMENTS if name in named), CACHE_ARGUMENTS[-1]): cache}


@contextlib.contextmanager
def steps_like_texts(model: Any) -> Iterator[None]:
    """Make Mamba-2 keep the limits of time steps for single tokens, as for those of a text, inside a context.

    transformers' form for one token forgets them. By them a token is the same however a text is cut.
    """
    limits = mamba2.time_limits(model)

    def limited(step: Any) -> Any:
        def run(
            state: torch.Tensor,
            x: torch.Tensor,
            dt: torch.Tensor,
            *arguments: Any,
            dt_bias: torch.Tensor,
            dt_softplus: bool,  # noqa: ARG001
            **named: Any,
        ) -> Any:
            length = torch.nn.functional.softplus(dt + dt_bias.to(dt.dtype)).clamp(*limits)
            return step(state, x, length, *arguments, dt_bias=None, dt_softplus=False, **named)

        return run

    with replaced_functions(model, {mamba2.STEP: limited}):
        yield


@contextlib.contextmanager
def recorded_owners(model: Any, cache: Any | None) -> Iterator[Mapping[Any, tuple[int, frozenset[StateKey]]]]:
    """Modules that ask a cache for states inside a context, with their layer and which states."""
    found: dict[Any, tuple[int, frozenset[StateKey]]] = {}
    running: list[Any] = []
    if cache is None:
        yield found
        return

    def record(kind: str, layer: int, index: int) -> None:
        if running:
            _, known = found.get(running[-1], (layer, frozenset()))
            found[running[-1]] = layer, known | {(kind, index)}

    def recording(kind: str, name: str) -> Any:
        original = getattr(cache, name)

        def call(*arguments: Any, **named: Any) -> Any:
            given = inspect.signature(original).bind(*arguments, **named).arguments
            record(kind, given["layer_idx"], given.get("state_idx", 0))
            return original(*arguments, **named)

        return call

    names = {f"{verb}_{kind}_state": kind for kind in RECURRENT_KINDS for verb in ("get", "update")}
    replaced = {name: recording(kind, name) for name, kind in names.items()}
    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(lambda module, _: running.append(module)))
        hooks.append(module.register_forward_hook(lambda *_: running.pop() and None))
    vars(cache).update(replaced)
    try:
        yield found
    finally:
        for name in replaced:
            del vars(cache)[name]
        for hook in hooks:
            hook.remove()
