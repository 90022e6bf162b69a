"""Families whose attention does not go through transformers' attention interface, or not as it is, made to.

An adapter puts its own `forward` in the place of that of a family's attention modules: the family's projections,
reshapes and biases, with one call of the attention function in the place of the family's softmax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from sinkexport.families import bloom, doge, falcon, gpt_neox_japanese, gptj, mpt

AttentionFunction = Callable[..., tuple[torch.Tensor, None]]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Adaptation of one family.

    attention: class names of its attention modules. has_alibi: whether a model of this configuration has ALiBi.
    forward: what replaces theirs, ``forward(attend, model, module, hidden_states, ...)``; attend: `AttentionFunction`.
    rotary: makes the rotary embedding of a model that has none as a module of its own; `forward` uses one that is put
    at ``ROTARY_NAME``. rotate: the family's rotation of x [B, H, T, D], ``rotate(module, x, cos, sin)``.
    """

    attention: frozenset[str]
    has_alibi: Callable[[Any], bool]
    forward: Callable[..., Any]
    rotary: Callable[[Any], torch.nn.Module] | None = None
    rotate: Callable[..., torch.Tensor] | None = None


ROTARY_NAME = "transformer.rotary_emb"

ADAPTERS: Mapping[str, Adapter] = {
    "bloom": Adapter(frozenset(("BloomAttention",)), lambda _: True, bloom.attention),
    "doge": Adapter(frozenset(("DogeAttention",)), lambda _: False, doge.attention),
    "mpt": Adapter(frozenset(("MptAttention",)), lambda _: True, mpt.attention),
    "falcon": Adapter(frozenset(("FalconAttention", "FalconFlashAttention2")), falcon.has_alibi, falcon.attention),
    "gpt_neox_japanese": Adapter(
        frozenset(("GPTNeoXJapaneseAttention",)), lambda _: False, gpt_neox_japanese.attention
    ),
    "gptj": Adapter(
        frozenset(("GPTJAttention", "GPTJFlashAttention2")),
        lambda _: False,
        gptj.attention,
        gptj.sinusoids,
        gptj.rotate,
    ),
    "codegen": Adapter(frozenset(("CodeGenAttention",)), lambda _: False, gptj.attention, gptj.sinusoids, gptj.rotate),
}
"""Adapters by transformers' model_type."""


def find_adapter(model: Any) -> Adapter | None:
    """The adapter that a model needs, or None."""
    return ADAPTERS.get(model.config.get_text_config().model_type)


def has_alibi(model: Any) -> bool:
    """Whether a model encodes positions by ALiBi and may lack a rotary embedding."""
    adapter = find_adapter(model)
    return adapter is not None and adapter.has_alibi(model.config)


@contextlib.contextmanager
def adapted(model: Any, adapter: Adapter, attend: AttentionFunction) -> Iterator[None]:
    """Every attention of `model` calls `attend`; contexts may nest."""
    modules = [module for module in model.modules() if type(module).__name__ in adapter.attention]
    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = functools.partial(adapter.forward, attend, model, module)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward
