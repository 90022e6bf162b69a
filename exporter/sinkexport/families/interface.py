"""Reroute a model's attention through transformers' attention interface, for as long as a context lasts."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sinkrt.errors import UsageError, problem

from sinkexport.families.adapters import AttentionFunction, adapted, find_adapter
from sinkexport.families.indexers import every_token_chosen, no_mask, without_choices
from sinkexport.recurrent.registry import is_without_attention

MaskFunction = Callable[..., torch.Tensor]
"""transformers' mask interface: keywords ``batch_size, q_length, kv_length, mask_function ..`` -> a mask."""


IGNORED_ARGUMENTS = frozenset(
    # What families pass to the attention function without changing what a single step computes, and what the probe saw.
    (
        "dropout",
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "is_causal",
        "training",
        "output_hidden_states",
        "return_dict",
        "logits_to_keep",
        "cache",
        "past_key_values",
        "position_embeddings",
        "token_type_ids",
        "deterministic",
        "output_router_logits",
        "sliding_window",
    )
)


@contextlib.contextmanager
def intercept_attention(
    model: torch.nn.Module,
    function: AttentionFunction,
    masks: MaskFunction | None = None,
    *,
    own_indexers: bool = False,
) -> Iterator[None]:
    """Every softmax attention of `model` calls ``function(module, q, k, v, mask, scaling=..., ...)`` instead.

    q: [B, Hq, T, D], k and v: [B, Hkv, T, D], as the model rotated them. Must return ([B, T, Hq, D], None).
    masks: makes the masks; None: transformers builds none. A family that does not use the interface is adapted, and has
    none; one with ALiBi passes ``alibi_slopes``, float32 [Hq].
    own_indexers: indexers choose as the model's own do, and what they chose is passed on; otherwise all tokens.

    Raises: UsageError if the model does not use the interface and there is no adapter for it.
    """
    if (adapter := find_adapter(model)) is not None:
        with adapted(model, adapter, function):
            yield
        return
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = f"sinkexport-{uuid.uuid4().hex}"  # contexts may nest
    before = model.config._attn_implementation

    def call(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention_mask: Any = None, **arguments: Any
    ) -> tuple[torch.Tensor, None]:
        arguments = without_choices(stand_ins, arguments)
        return function(module, q, k, v, attention_mask, **arguments)  # some families pass the mask by its name

    ALL_ATTENTION_FUNCTIONS.register(name, call)
    stack = contextlib.ExitStack()
    stand_ins = [] if own_indexers else stack.enter_context(every_token_chosen(model))
    if masks is None and stand_ins:
        masks = no_mask
    if masks is not None:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, masks)
    try:
        try:
            model.set_attn_implementation(name)
        except (ValueError, AttributeError, ImportError) as error:
            if not is_without_attention(model):
                raise _unsupported(model) from error
        if model.config._attn_implementation != name and not is_without_attention(model):
            raise _unsupported(model)
        yield
    finally:
        stack.close()
        _restore(model, before)
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name, None)
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(name, None)


def layer_of(module: Any) -> int:
    """Index of an attention module's layer; 0 if it has none, because several layers share it."""
    layer = getattr(module, "layer_idx", None)
    return 0 if layer is None or int(layer) < 0 else int(layer)


@contextlib.contextmanager
def attention_inputs(model: torch.nn.Module) -> Iterator[dict[torch.nn.Module, torch.Tensor]]:
    """The hidden states [B, T, N] that attention modules were last called with, by module, inside a context."""
    inputs: dict[torch.nn.Module, torch.Tensor] = {}

    def remember(module: torch.nn.Module, arguments: tuple[Any, ...], others: dict[str, Any]) -> None:
        given = others.get("hidden_states", arguments[0] if arguments else None)
        if isinstance(given, torch.Tensor):
            inputs[module] = given

    # What the attention function is called by has a layer's index; so may what is around it, which does no harm.
    hooks = [
        module.register_forward_pre_hook(remember, with_kwargs=True)
        for module in model.modules()
        if getattr(module, "layer_idx", None) is not None
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def random_embeddings(model: Any, num_ids: int, seed: int = 0) -> Iterator[None]:
    """Ids 0 .. num_ids - 1 are embedded as random vectors of unit variance inside a context.

    A model's own rows may be all zeros, as that of a padding token, or tiny: they would show nothing of its layers.
    The token embedding alone is replaced, whatever it multiplies its rows by: it may have fewer rows than num_ids. A
    model without `get_input_embeddings` keeps its own.
    """
    given: list[torch.Tensor] = []

    def known(
        module: torch.nn.Module, arguments: tuple[Any, ...], others: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = arguments[0] if arguments else others["input"]
        given[:] = [ids]
        rows = getattr(module, "num_embeddings", num_ids)
        return ((ids % rows, *arguments[1:]), others) if arguments else ((), {**others, "input": ids % rows})

    def replace(_module: torch.nn.Module, _arguments: Any, output: torch.Tensor) -> torch.Tensor:
        rows = torch.randn(num_ids, output.shape[-1], generator=torch.Generator().manual_seed(seed))
        return rows[given[0]].to(output.dtype)

    find = getattr(model, "get_input_embeddings", None)
    embedding = None
    if find is not None:
        with contextlib.suppress(NotImplementedError, AttributeError):
            embedding = find()
    if embedding is None:
        yield
        return
    hooks = [embedding.register_forward_pre_hook(known, with_kwargs=True), embedding.register_forward_hook(replace)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def own_values(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """An attention in which each token sees itself alone: [B, T, Hq, D] of v [B, Hkv, T, D]."""
    return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).transpose(1, 2).contiguous()


def as_many_heads(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, H, T, D] as they are, or the fewer heads repeated, each for a group of the others."""
    num_heads = max(k.shape[1], v.shape[1])
    k, v = (x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1) for x in (k, v))
    return k, v


def refuse_arguments(layer: int, others: dict[str, Any]) -> None:
    """Refuse what a family passes to its attention function and the operator does not know."""
    unknown = sorted(key for key, value in others.items() if value is not None and key not in IGNORED_ARGUMENTS)
    if unknown:
        raise UsageError(
            problem(
                "attention",
                received=f"the argument '{unknown[0]}' in layer {layer}",
                expected="plain softmax attention",
                fix="this model cannot be exported exactly",
            )
        )


def _restore(model: Any, implementation: str | None) -> None:
    with contextlib.suppress(ValueError, AttributeError, ImportError):
        model.set_attn_implementation(implementation)


def _unsupported(model: torch.nn.Module) -> UsageError:
    return UsageError(
        problem(
            "model",
            received=f"{type(model).__name__}, which does not use transformers' attention interface",
            expected="a model that does, or a family of 'sinkexport inspect families'",
            fix="its attention cannot be replaced, so that it cannot be exported",
        )
    )
