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

from sinkexport.families.interface import intercept_attention, random_embeddings
from sinkexport.families.rope import Replacements, replaced_rotary

WEIGHT = "weight"


def norms_of_calls(model: torch.nn.Module, identity: Replacements, num_tokens: int, cache: Any) -> list[list[str]]:
    """Modules with a weight whose outputs are the queries and keys of an attention call, for each call."""
    names = {module: name for name, module in model.named_modules()}
    outputs: dict[tuple[int, int], tuple[str, torch.Tensor]] = {}  # the tensors too: memory must not be used again
    found: list[list[str]] = []

    def remember(module: torch.nn.Module, _arguments: Any, output: Any) -> None:
        weight = getattr(module, WEIGHT, None)
        is_norm = isinstance(output, torch.Tensor) and isinstance(weight, torch.nn.Parameter)
        if is_norm and weight.shape == output.shape[-1:]:
            outputs[output.data_ptr(), output.numel()] = names[module], output

    def record(_module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Any:
        keys = ((x.data_ptr(), x.numel()) for x in (q, k))
        found.append([outputs[key][0] for key in keys if key in outputs])
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).transpose(1, 2).contiguous(), None

    ids = torch.arange(num_tokens)[None]
    hooks = [module.register_forward_hook(remember) for module in names]
    try:
        with (
            torch.no_grad(),
            random_embeddings(model, num_tokens),
            intercept_attention(model, record),
            replaced_rotary(model, identity),
        ):
            model(input_ids=ids, position_ids=ids, past_key_values=cache, use_cache=False)
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
    norm._parameters[WEIGHT] = torch.ones_like(weight)  # type: ignore[assignment, arg-type]
    try:
        return type(norm).forward(norm, *arguments, **named)
    finally:
        norm._parameters[WEIGHT] = weight
