"""MoE layers whose code loops over the experts that happen to be chosen, computed with static shapes instead.

transformers lets most families' experts be computed in another form (model/experts.py). These it does not:

- matrices of all experts in `gate_up_proj` and `down_proj`, some experts beyond them being the identity (LongCat-Flash,
  arXiv:2509.01322);
- DBRX's, whose matrices lie under each other;
- JetMoE's (arXiv:2404.07413), which sort tokens by their expert and split them, in the feed-forward layer and in the
  attention layer, where experts make queries and take the heads' outputs (MoA, arXiv:2210.05144).

They are recognised by what they hold. A layer that is taken for another is found by the check of the export, which
computes with the family's own loops.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sinkexport.model.experts import Experts, expert_matmul, is_gathered, is_in_cpu_library, mixed


def loop_experts(model: Any) -> dict[str, int]:
    """MoE layers of `model` that loop, by their names: how many experts each has."""
    return {name: form[0] for name, module in model.named_modules() if (form := _form(module)) is not None}


@contextlib.contextmanager
def unrolled_experts(model: Any, *, in_place: torch.dtype | None = None) -> Iterator[None]:
    """Experts that loop have static shapes for as long as a context lasts. in_place: as `static_experts`."""
    with contextlib.ExitStack() as stack:
        for module in list(model.modules()):
            if (form := _form(module)) is not None:
                stack.enter_context(form[1](module, in_place=in_place))
        yield


def _form(module: Any) -> tuple[int, Callable[..., contextlib.AbstractContextManager[None]]] | None:
    """Number of experts of a layer that loops, and the context that replaces its code; None: it is none."""
    if hasattr(module, "has_post_expert_norm"):  # transformers has other forms of it
        return None
    if _has_stacks(module, "gate_up_proj", "down_proj") and _takes_choices(module):
        return module.down_proj.shape[0], _replaced_stacks
    glu = getattr(module, "mlp", None)
    if all(isinstance(getattr(glu, name, None), torch.nn.Parameter) for name in ("w1", "v1", "w2")) and (
        hasattr(module, "num_experts")
    ):
        return module.num_experts, _replaced_rows
    first, second = (getattr(module, name, None) for name in ("input_linear", "output_linear"))
    if first is None or not hasattr(module, "router"):
        return None
    if _has_stacks(first, "weight") and _has_stacks(second, "weight"):
        is_attention = hasattr(module, "map") and hasattr(module, "reduce")
        return module.input_linear.weight.shape[0], _replaced_attention if is_attention else _replaced_sorting
    return None


def _takes_choices(module: Any) -> bool:
    """Whether a module is called with hidden states, chosen experts and shares; others compute all (Llama 4)."""
    return len(inspect.signature(type(module).forward).parameters) > 3  # itself is one


def _has_stacks(module: Any, *names: str) -> bool:
    """Whether a module has parameters of these names with a matrix for each expert."""
    found = [getattr(module, name, None) for name in names]
    return all(isinstance(one, torch.nn.Parameter) and one.dim() == 3 for one in found)


@contextlib.contextmanager
def _replaced(module: Any, **functions: Callable[..., Any]) -> Iterator[None]:
    """A module's methods replaced by these, which take it first."""
    for name, function in functions.items():
        setattr(module, name, functools.partial(function, module))
    try:
        yield
    finally:
        for name in functions:
            delattr(module, name)


# --- gate_up_proj [E.., 2 I, D] and down_proj [E, D, I] --------------------------------------------------------------


def _replaced_stacks(module: Any, *, in_place: torch.dtype | None) -> contextlib.AbstractContextManager[None]:
    def forward(
        module: Any, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """hidden [N, D], chosen int64 and shares [N, k] -> [N, D]."""
        count = module.down_proj.shape[0]
        inner = getattr(module, "_apply_gate", functools.partial(_gated, module.act_fn))
        is_whole = module.gate_up_proj.shape[0] == count
        is_read_whole = is_whole or is_gathered(chosen, count) or in_place == hidden.dtype
        first = module.gate_up_proj if is_read_whole else module.gate_up_proj[:count]
        experts = Experts(first=(first,), down=module.down_proj, inner=inner)
        if not hasattr(module, "identity_expert"):
            return mixed(experts, hidden, chosen, shares, in_place=in_place)
        is_identity = chosen >= count
        own = mixed(
            experts, hidden, chosen.clamp(max=count - 1), shares.masked_fill(is_identity, 0.0), in_place=in_place
        )
        kept = (shares * is_identity).sum(dim=-1, keepdim=True)  # [N, 1]
        return own + (hidden * kept).to(hidden.dtype)

    return _replaced(module, forward=forward)


def _gated(activation: Callable[[torch.Tensor], torch.Tensor], gate_up: torch.Tensor) -> torch.Tensor:
    """[.., 2 I] -> [.., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate) * up


# --- DBRX: w1, v1 and w2, all [E * I, D] -----------------------------------------------------------------------------


@contextlib.contextmanager
def _replaced_rows(module: Any, *, in_place: torch.dtype | None) -> Iterator[None]:
    def forward(module: Any, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """hidden [.., D], chosen int64 and shares [N, k] -> the shape of hidden."""
        glu = module.mlp

        def inner(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            activated: torch.Tensor = glu.activation_fn(gate) * up
            return activated

        experts = Experts(first=(glu.w1, glu.v1), down=glu.w2, inner=inner, is_down_transposed=True)
        rows = hidden.reshape(-1, hidden.shape[-1])
        return mixed(experts, rows, chosen, shares, in_place=in_place).reshape(hidden.shape)

    before = {name: getattr(module.mlp, name) for name in ("w1", "v1", "w2")}
    for name, rows in before.items():  # by the same memory: a graph gets the stacks that passes look for
        stack = rows.detach().reshape(module.num_experts, -1, rows.shape[-1])
        setattr(module.mlp, name, torch.nn.Parameter(stack, requires_grad=False))
    try:
        with _replaced(module, forward=forward):
            yield
    finally:
        for name, rows in before.items():
            setattr(module.mlp, name, rows)


# --- JetMoE: tokens sorted by their experts --------------------------------------------------------------------------


def _routed(router: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [N, D] -> chosen experts int64 [N, k] and their shares [N, k]."""
    logits = router.layer(hidden).float()
    top, chosen = logits.topk(router.top_k, dim=1)
    return chosen, torch.softmax(top, dim=1).type_as(hidden)


def _with_own_bias(module: Any, out: torch.Tensor) -> torch.Tensor:
    bias = getattr(module, "bias", None)
    return out if bias is None else out + bias


def _replaced_sorting(module: Any, *, in_place: torch.dtype | None) -> contextlib.AbstractContextManager[None]:
    def forward(module: Any, layer_input: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        hidden = layer_input.reshape(-1, layer_input.shape[-1])
        experts = Experts(
            first=(module.input_linear.weight,),
            down=module.output_linear.weight,
            inner=functools.partial(_gated, module.activation),
        )
        out = mixed(experts, hidden, *_routed(module.router, hidden), in_place=in_place)
        return _with_own_bias(module, out.reshape(layer_input.shape))

    return _replaced(module, forward=forward)


def _replaced_attention(module: Any, *, in_place: torch.dtype | None) -> contextlib.AbstractContextManager[None]:
    def make_queries(module: Any, layer_input: torch.Tensor) -> tuple[torch.Tensor, None, tuple[torch.Tensor, ...]]:
        """[B, T, D] -> queries [B, T, k, H], no logits, and what `merge_heads` needs."""
        hidden = layer_input.reshape(-1, layer_input.shape[-1])
        chosen, shares = _routed(module.router, hidden)
        weight = module.input_linear.weight  # [E, H, D]
        in_library = is_in_cpu_library(in_place, hidden)
        if in_library or is_gathered(chosen, weight.shape[0]):
            queries = expert_matmul(hidden, weight, chosen.reshape(-1), False, in_library)  # [N * k, H]
        else:
            every = expert_matmul(hidden[None], weight, None, False)  # [E, N, H]
            queries = every[chosen, torch.arange(len(hidden))[:, None]]  # [N, k, H]
        return queries.reshape(*layer_input.shape[:2], chosen.shape[1], -1), None, (chosen, shares)

    def merge_heads(module: Any, heads: torch.Tensor, topology: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Outputs of heads [B, T, k, H] -> [B, T, D]."""
        chosen, shares = topology
        weight = module.output_linear.weight  # [E, D, H]
        rows = heads.reshape(*chosen.shape, -1)  # [N, k, H]
        in_library = is_in_cpu_library(in_place, rows)
        if in_library or is_gathered(chosen, weight.shape[0]):
            out = expert_matmul(rows.flatten(0, 1), weight, chosen.reshape(-1), False, in_library)  # [N * k, D]
            out = (out.reshape(*chosen.shape, -1) * shares[..., None]).sum(dim=1)
        else:  # without a bias: what an expert was not chosen for is zero
            is_chosen = chosen.T[None] == torch.arange(weight.shape[0])[:, None, None]  # [E, k, N]
            given = ((is_chosen * shares.T)[..., None] * rows.transpose(0, 1)).sum(dim=1)  # [E, N, H]
            out = expert_matmul(given, weight, None, False).sum(dim=0)
        return _with_own_bias(module, out.reshape(*heads.shape[:2], -1))

    return _replaced(module, map=make_queries, reduce=merge_heads)
