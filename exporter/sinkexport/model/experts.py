"""Mixtures of experts with static shapes: no loop over the experts that happen to be chosen.

For few tokens the chosen experts' weights are gathered: a run reads them and no others, but copies them. For more,
every expert sees every token, and what was not chosen counts nothing: a run reads all weights once, in place. As one
layer of 8 experts of 1024 x 1792, 2 chosen (of 32 of 1024 x 512, 4 chosen), two threads of a shared AMD EPYC, in ms
(tenth percentile):

    tokens a run     1            2            4            64
    gathered         17 (3)       36 (15)      80 (36)      -
    all experts      35 (32)      34 (36)      38 (32)      146 (127)
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import Any

import torch


def has_experts(model: Any) -> bool:
    """Whether the model has mixtures of experts that transformers lets be computed in another form."""
    return any(hasattr(module, "has_post_expert_norm") for module in model.modules())  # set by their decorator


@contextlib.contextmanager
def static_experts(model: Any) -> Iterator[None]:
    """The experts of `model`, if it has some, take one of the two forms for as long as a context lasts."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if not has_experts(model):
        yield
        return
    name = f"sinkexport-{uuid.uuid4().hex}"
    before = model.config._experts_implementation
    ALL_EXPERTS_FUNCTIONS.register(name, _experts)
    try:
        model.set_experts_implementation(name)
        yield
    finally:
        model.set_experts_implementation(before)
        ALL_EXPERTS_FUNCTIONS._global_mapping.pop(name, None)


def _experts(module: Any, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """transformers' experts interface: hidden [N, D], chosen experts int64 [N, k] and their shares [N, k] -> [N, D]."""
    num_tokens, num_chosen = chosen.shape
    if 2 * num_tokens * num_chosen < module.num_experts:
        picks = chosen.reshape(-1)  # [N * k]
        x = hidden[:, None].expand(-1, num_chosen, -1).reshape(len(picks), 1, -1)  # [N * k, 1, D]
        out = _expert_layers(module, x, picks) * shares.reshape(-1, 1, 1)
        return out.reshape(num_tokens, num_chosen, -1).sum(dim=1).to(hidden.dtype)
    is_chosen = chosen[..., None] == torch.arange(module.num_experts)  # [N, k, E]
    share = (is_chosen * shares[..., None]).sum(dim=1)  # [N, E]
    out = _expert_layers(module, hidden[None], None) * share.T[..., None]  # [E, N, D]
    return out.sum(dim=0).to(hidden.dtype)


def _expert_layers(module: Any, x: torch.Tensor, picks: torch.Tensor | None) -> torch.Tensor:
    """x [1 or P, n, D] through the experts `picks` [P], or all of them for None: [P, n, D]."""
    x = _products(module, "gate_up_proj" if module.has_gate else "up_proj", x, picks)  # [P, n, I or 2 I]
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = _products(module, "down_proj", x, picks)
    return module.post_expert_norm(x) if module.has_post_expert_norm else x


def _products(module: Any, name: str, x: torch.Tensor, picks: torch.Tensor | None) -> torch.Tensor:
    """x [1 or P, n, K] by each expert's weight: [P, n, M]. Weights, [P, K, M] or [P, M, K], are never transposed."""

    def taken(parameter: torch.Tensor) -> torch.Tensor:
        return parameter if picks is None else parameter.index_select(0, picks)

    weight = taken(getattr(module, name))
    out = x @ weight if module.is_transposed else (weight @ x.mT).mT
    return out + taken(getattr(module, f"{name}_bias")[:, None]) if module.has_bias else out
