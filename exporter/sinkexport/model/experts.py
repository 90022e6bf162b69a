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


def mixtures(model: Any) -> dict[str, Any]:
    """The model's mixtures of experts that transformers lets be computed in another form, by their names."""
    # The attribute is set by their decorator.
    return {name: module for name, module in model.named_modules() if hasattr(module, "has_post_expert_norm")}


@contextlib.contextmanager
def static_experts(model: Any) -> Iterator[None]:
    """The experts of `model`, if it has some, take one of the two forms for as long as a context lasts."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if not mixtures(model):
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
    """x [1 or P, n, K] by each expert's weight: [P, n, M]."""
    out = expert_product(x, getattr(module, name), picks, module.is_transposed)
    return out + _taken(getattr(module, f"{name}_bias")[:, None], picks) if module.has_bias else out


@torch.library.custom_op("sinkexport::expert_product", mutates_args=())
def expert_product(
    x: torch.Tensor, weight: torch.Tensor, picks: torch.Tensor | None, is_transposed: bool
) -> torch.Tensor:
    """x [1 or P, n, K] by the matrices of the experts `picks`, int64 [P], or of all E of them: [P or E, n, M].

    weight: [E, K, M] if `is_transposed`, else [E, M, K]; never transposed. One node of the trace, so that a recipe can
    find it (graph/passes/experts.py).
    """
    chosen = _taken(weight, picks)
    return x @ chosen if is_transposed else (chosen @ x.mT).mT.contiguous()


@expert_product.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, picks: torch.Tensor | None, is_transposed: bool) -> torch.Tensor:
    experts = weight.shape[0] if picks is None else picks.shape[0]
    return x.new_empty(experts, x.shape[1], weight.shape[2 if is_transposed else 1])


def _taken(parameter: torch.Tensor, picks: torch.Tensor | None) -> torch.Tensor:
    return parameter if picks is None else parameter.index_select(0, picks)


def routers(model: Any) -> frozenset[str]:
    """Names of the modules that choose experts: neighbours of a mixture, with one output for each of its experts."""
    found = set()
    for path, mixture in mixtures(model).items():
        parent = path.rpartition(".")[0]
        for name, module in model.get_submodule(parent).named_children():
            weight = getattr(module, "weight", None)
            if weight is not None and weight.ndim == 2 and weight.shape[0] == mixture.num_experts:
                found.add(f"{parent}.{name}")
    return frozenset(found)
