"""Norms between the rotation and attention, and their weights (Hunyuan): queries ``w_q * norm(R(p) q)``, keys alike.

A root mean square does not change in a rotation, so norm and rotation can be exchanged; the weights cannot, unless both
of a pair have the same. So a key is kept before its weight, rotated at its stream position, and the query takes both
weights. Rotated at its in-cache position p = min(t, C - 1) and multiplied by w_q * w_k, it meets a sink's key at that
key's in-cache position. For the window, whose keys are ``shift(t) = max(0, t - (C - 1))`` further on than their
in-cache positions, the product is turned forward by the shift.

Found out by behaviour: the module that hands attention its queries or keys, with a weight of one number a dimension,
without which they are a plain rotation.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from sinkexport.families.interface import intercept_attention, own_values, random_embeddings
from sinkexport.families.recurrent import with_cache
from sinkexport.families.rope import Replacements, replaced_rotary
from sinkexport.recurrent.registry import each_token_alone

WEIGHT = "weight"


def norms_of_calls(model: Any, identity: Replacements, num_tokens: int, cache: Any) -> list[list[str]]:
    """Modules with a weight whose outputs are the queries and keys of an attention call, for each call."""
    names = {module: name for name, module in model.named_modules()}
    outputs: dict[tuple[int, int], tuple[str, torch.Tensor]] = {}  # the tensors too: memory must not be used again
    found: list[list[str]] = []

    def remember(module: torch.nn.Module, _arguments: Any, output: Any) -> None:
        weight = module._parameters.get(WEIGHT)
        if weight is not None and isinstance(output, torch.Tensor) and weight.shape == output.shape[-1:]:
            outputs[output.data_ptr(), output.numel()] = names[module], output

    def record(_module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Any:
        keys = ((x.data_ptr(), x.numel()) for x in (q, k))
        found.append([outputs[key][0] for key in keys if key in outputs])
        return own_values(q, v), None

    ids = torch.arange(num_tokens)[None]
    hooks = [module.register_forward_hook(remember) for module in names]
    try:
        with (
            torch.no_grad(),
            random_embeddings(model, num_tokens),
            intercept_attention(model, record),
            replaced_rotary(model, identity),
            each_token_alone(model),
        ):
            model(input_ids=ids, position_ids=ids, use_cache=False, **with_cache(model, cache))
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextlib.contextmanager
def without_weights(model: torch.nn.Module, names: Iterable[str]) -> Iterator[None]:
    """The norms of these names multiply by ones in the place of their weights, which stay where they are."""
    norms = [model.get_submodule(name) for name in sorted(names)]
    for norm in norms:
        norm.forward = functools.partial(_unweighted, norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _unweighted(norm: torch.nn.Module, *arguments: Any, **named: Any) -> Any:
    weight = norm._parameters[WEIGHT]
    norm._parameters[WEIGHT] = torch.ones_like(weight)
    try:
        return type(norm).forward(norm, *arguments, **named)
    finally:
        norm._parameters[WEIGHT] = weight
