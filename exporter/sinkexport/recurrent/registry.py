"""Rules that there are, and how a model's recurrent layers are made to follow them.

A layer whose states live in transformers' cache has a `CacheRule`, and any other a `ModuleRule`. Add a rule to one of
both tuples: the probe and the trace ask for no more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from sinkrt.errors import UsageError, problem

from sinkexport.recurrent import lightning, mlstm, rg_lru, rwkv, zaya
from sinkexport.recurrent.delta_rule import DELTA_RULE
from sinkexport.recurrent.kda import KIMI_DELTA_RULE
from sinkexport.recurrent.mamba1 import MAMBA1
from sinkexport.recurrent.mamba2 import MAMBA2
from sinkexport.recurrent.modules import ModuleRule, TokenStates, explicit_states, layer_of
from sinkexport.recurrent.rules import CacheRule
from sinkexport.recurrent.short_convolution import SHORT_CONVOLUTION
from sinkexport.recurrent.states import FixedState, RecurrentShapes, StateKey, Tokens, state_of
from sinkexport.recurrent.step_cache import LayerStates, StepCache

CACHE_RULES: tuple[CacheRule, ...] = (DELTA_RULE, KIMI_DELTA_RULE, MAMBA1, MAMBA2, SHORT_CONVOLUTION)
"""Rules of layers whose states live in transformers' cache."""

MODULE_RULES: tuple[ModuleRule, ...] = (
    *lightning.RULES,
    *mlstm.RULES,
    *rg_lru.RULES,
    *rwkv.RULES,
    *zaya.RULES,
)
"""Rules of modules that keep their states elsewhere."""

Owners = Mapping[Any, tuple[int, frozenset[StateKey]]]
"""Modules that ask transformers' cache for states: their layer, and which states."""


def refuse_unknown(owners: Owners) -> None:
    """Refuse a model with a recurrent layer that no rule covers.

    Raises: UsageError that names the layer and its class.
    """
    for module, (layer, keys) in owners.items():
        if not any(rule.covers(module, keys) for rule in CACHE_RULES):
            kinds = ", ".join(f"{kind} {index}" for kind, index in sorted(keys))
            raise UsageError(
                problem(
                    "recurrent states",
                    received=f"those of a {type(module).__name__} in layer {layer} ({kinds})",
                    expected=f"a known rule: {', '.join(rule.name for rule in CACHE_RULES)}",
                    fix="this model cannot be exported exactly",
                )
            )


class _Ruled:
    """One module with a `ModuleRule`. keys: by the rule's own key, that of the layer, in which indices run through."""

    def __init__(self, module: Any, rule: ModuleRule, layer: int, keys: Mapping[StateKey, StateKey]) -> None:
        self.module, self.rule, self.layer, self.keys = module, rule, layer, keys


def _ruled_modules(model: Any) -> list[_Ruled]:
    """A model's modules that have a `ModuleRule`, in their order."""
    rules = {rule.class_name: rule for rule in MODULE_RULES}
    found: list[_Ruled] = []
    for name, module in model.named_modules():
        if (rule := rules.get(type(module).__name__)) is None:
            continue
        layer, keys = layer_of(name), {}
        taken = [key for one in found if one.layer == layer for key in one.keys.values()]
        for kind, index in rule.shapes(module):
            keys[kind, index] = kind, index + sum(before == kind for before, _ in taken)
        found.append(_Ruled(module, rule, layer, keys))
    return found


def module_shapes(model: Any) -> RecurrentShapes:
    """States of the modules that have a `ModuleRule`, by layer."""
    dtype = next(model.parameters()).dtype
    shapes: dict[int, dict[StateKey, FixedState]] = {}
    for one in _ruled_modules(model):
        found = {one.keys[key]: state_of(key[0], shape, dtype) for key, shape in one.rule.shapes(one.module).items()}
        shapes.setdefault(one.layer, {}).update(found)
    return shapes


class RecurrentStates:
    """States of all recurrent layers of a model while T tokens of each of B streams run through it."""

    def __init__(self, model: Any, states: Mapping[int, Mapping[StateKey, torch.Tensor]], tokens: Tokens) -> None:
        self._model, self._tokens = model, tokens
        self._ruled = [one for one in _ruled_modules(model) if one.layer in states]
        self._cache = StepCache(states, tokens)
        self._of_module: dict[Any, tuple[ModuleRule, TokenStates]] = {}
        for one in self._ruled:
            own = {key: states[one.layer][in_layer] for key, in_layer in one.keys.items()}
            given = TokenStates(own, tokens.is_token, tokens.num_valid, tokens.begins)
            self._of_module[one.module] = one.rule, given

    @property
    def cache(self) -> StepCache | None:
        """To be passed to the model; None: its modules with a `ModuleRule` have all states, and ask no cache."""
        ruled = {(one.layer, key) for one in self._ruled for key in one.keys.values()}
        owned = {(layer, key) for layer, states in self._cache.after.items() for key in states}
        return self._cache if owned - ruled else None

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Make the model's recurrent layers follow their rules inside a context."""
        with contextlib.ExitStack() as contexts:
            for rule in CACHE_RULES:
                contexts.enter_context(rule.in_place(self._model, self._cache, self._tokens))
            contexts.enter_context(explicit_states(self._of_module))
            yield

    def after(self) -> Mapping[int, LayerStates]:
        """What became of the states, by layer."""
        self._cache.finish()
        for one in self._ruled:
            _, given = self._of_module[one.module]
            for key, in_layer in one.keys.items():
                self._cache.after[one.layer][in_layer] = given.states[key]
        return self._cache.after


def is_without_attention(model: Any) -> bool:
    """Whether every layer has a module with a `ModuleRule`: what does not know transformers' attention has none."""
    layers = {one.layer for one in _ruled_modules(model)}
    return layers == set(range(model.config.get_text_config().num_hidden_layers))


@contextlib.contextmanager
def each_token_alone(model: Any) -> Iterator[None]:
    """Run every token through modules that have a `ModuleRule` as a stream of its own, from states of zeros."""
    with contextlib.ExitStack() as contexts:
        for one in _ruled_modules(model):
            contexts.enter_context(_alone(one))
        yield


@contextlib.contextmanager
def _alone(one: _Ruled) -> Iterator[None]:
    dtype = next(one.module.parameters()).dtype

    def forward(*arguments: Any, **named: Any) -> Any:
        hidden = arguments[0] if arguments else named["hidden_states"]
        batch, num_tokens = hidden.shape[:2]
        count = batch * num_tokens
        found = {key: state_of(key[0], shape, dtype) for key, shape in one.rule.shapes(one.module).items()}
        states = {key: torch.zeros(count, *state.shape, dtype=state.dtype) for key, state in found.items()}
        is_token = torch.ones(count, 1, dtype=torch.bool)
        given = TokenStates(states, is_token, None, is_token)

        def apart(x: Any) -> Any:
            is_per_token = isinstance(x, torch.Tensor) and x.shape[:2] == (batch, num_tokens)
            return x.flatten(0, 1)[:, None] if is_per_token else x

        def together(x: Any) -> Any:
            is_per_token = isinstance(x, torch.Tensor) and x.shape[:2] == (count, 1)
            return x[:, 0].unflatten(0, (batch, num_tokens)) if is_per_token else x

        out = one.rule.forward(one.module, given, *_each(apart, arguments), **_each(apart, named))
        return _each(together, out)

    before = one.module.__dict__.get("forward")
    one.module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del one.module.forward
        else:
            one.module.forward = before


def _each(change: Callable[[Any], Any], values: Any) -> Any:
    """`change` of a value, or of each in a tuple or a mapping."""
    if isinstance(values, tuple):
        return tuple(_each(change, value) for value in values)
    if isinstance(values, dict):
        return {name: _each(change, value) for name, value in values.items()}
    return change(values)
