"""Experts of MoE layers with static shapes: no loop over the experts that happen to be chosen.

In standard operators, for few tokens the chosen experts' weights are gathered: a run reads them and no others, but
copies them. For more, every expert sees every token, and what was not chosen counts nothing: a run reads all weights
once, in place. As one layer of 8 experts of 1024 x 1792, 2 chosen (of 32 of 1024 x 512, 4 chosen), two threads of a
shared AMD EPYC, in ms (tenth percentile):

    tokens a run     1            2            4            64
    gathered         17 (3)       36 (15)      80 (36)      -
    all experts      35 (32)      34 (36)      38 (32)      146 (127)

The TensorRT plugin and the CPU library read chosen experts where they lie: there every token takes its own and no
others, however many tokens there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import torch

MAX_PICKS, MAX_EXPERTS, MAX_FEATURES, INPUTS_MULTIPLE = 2048, 512, 1 << 21, 8
"""Limits of the plugin's kernel: choices in one run, experts of a layer, inputs and outputs of a float16 matrix."""


def declared_experts(model: Any) -> dict[str, Any]:
    """MoE layers of a model that transformers lets be computed in another form, by their names."""
    # The attribute is set by their decorator.
    return {name: module for name, module in model.named_modules() if hasattr(module, "has_post_expert_norm")}


@contextlib.contextmanager
def static_experts(model: Any, *, in_place: torch.dtype | None = None) -> Iterator[None]:
    """The experts of `model`, if it has some, take one of these forms for as long as a context lasts.

    in_place: the graph is for a kernel library that reads chosen experts of this type where they lie.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if not declared_experts(model):
        yield
        return
    name = f"sinkexport-{uuid.uuid4().hex}"
    before = model.config._experts_implementation
    ALL_EXPERTS_FUNCTIONS.register(name, functools.partial(_experts, in_place=in_place))
    try:
        model.set_experts_implementation(name)
        yield
    finally:
        model.set_experts_implementation(before)
        ALL_EXPERTS_FUNCTIONS._global_mapping.pop(name, None)


@dataclasses.dataclass(frozen=True)
class Experts:
    """The matrices of an MoE layer's experts.

    first: [E, M, K] each, or [E, K, M] if `is_transposed`: one, or a gate and what it gates. down: from [.., I] back.
    first_bias, down_bias: [E, M] or None. inner: results of `first` [.., M] -> [.., I]. after: what each expert's
    output [.., D] goes through, or None.
    """

    first: tuple[torch.Tensor, ...]
    down: torch.Tensor
    inner: Callable[..., torch.Tensor]
    is_transposed: bool = False
    is_down_transposed: bool = False
    first_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    after: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.down.shape[0])

    @property
    def matrices(self) -> list[tuple[torch.Tensor, bool]]:
        """All, each with whether it is transposed."""
        return [*((weight, self.is_transposed) for weight in self.first), (self.down, self.is_down_transposed)]


def _experts(
    module: Any, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor, *, in_place: torch.dtype | None
) -> torch.Tensor:
    """transformers' experts interface: hidden [N, D], chosen experts int64 [N, k] and their shares [N, k] -> [N, D]."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    experts = Experts(
        first=(getattr(module, name),),
        down=module.down_proj,
        inner=module._apply_gate if module.has_gate else module.act_fn,
        is_transposed=module.is_transposed,
        is_down_transposed=module.is_transposed,
        first_bias=getattr(module, f"{name}_bias") if module.has_bias else None,
        down_bias=module.down_proj_bias if module.has_bias else None,
        after=module.post_expert_norm if module.has_post_expert_norm else None,
    )
    return mixed(experts, hidden, chosen, shares, in_place=in_place)


def is_in_cpu_library(in_place: torch.dtype | None, hidden: torch.Tensor) -> bool:
    """Whether the CPU library, which has no limits, reads the experts of such rows where they lie."""
    return in_place == hidden.dtype == torch.float32


def mixed(
    experts: Experts, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor, *, in_place: torch.dtype | None
) -> torch.Tensor:
    """Sum of the outputs of each token's experts by their shares: hidden [N, D], chosen, shares [N, k] -> [N, D]."""
    num_tokens, num_chosen = chosen.shape
    if is_in_cpu_library(in_place, hidden):
        return _chosen_experts(experts, hidden, chosen, shares, in_place=True)
    if in_place == hidden.dtype == torch.float16 and num_chosen <= MAX_PICKS and _fits_plugin(experts):
        # All experts never, not even for more tokens than a node takes: both graphs share one form of the weights.
        step = MAX_PICKS // num_chosen
        if num_tokens <= step:
            return _chosen_experts(experts, hidden, chosen, shares, in_place=True)
        starts = range(0, num_tokens, step)
        parts = ([x[start : start + step] for x in (hidden, chosen, shares)] for start in starts)
        return torch.cat([_chosen_experts(experts, *part, in_place=True) for part in parts])
    if is_gathered(chosen, experts.num_experts):
        return _chosen_experts(experts, hidden, chosen, shares)
    is_chosen = chosen[..., None] == torch.arange(experts.num_experts)  # [N, k, E]
    share = (is_chosen * shares[..., None]).sum(dim=1)  # [N, E]
    out = _expert_layers(experts, hidden[None], None) * share.T[..., None]  # [E, N, D]
    return out.sum(dim=0).to(hidden.dtype)


def is_gathered(chosen: torch.Tensor, num_experts: int) -> bool:
    """Whether so few experts are chosen [N, k] that their weights are gathered."""
    return 2 * chosen.numel() < num_experts


def _chosen_experts(
    experts: Experts, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor, *, in_place: bool = False
) -> torch.Tensor:
    """Each token by its own experts alone; shapes as above."""
    out = _expert_layers(experts, hidden, chosen.reshape(-1), in_place=in_place) * shares.reshape(-1, 1)  # [N * k, D]
    return out.reshape(*chosen.shape, -1).sum(dim=1).to(hidden.dtype)


def _expert_layers(
    experts: Experts, x: torch.Tensor, picks: torch.Tensor | None, *, in_place: bool = False
) -> torch.Tensor:
    """x [N, D] through the experts `picks` [P], P / N of them for each row: [P, D]. Or, for None, x [1, N, D] through
    all: [E, N, D]."""
    made = [
        _with_bias(expert_matmul(x, weight, picks, experts.is_transposed, in_place), experts.first_bias, picks)
        for weight in experts.first
    ]
    x = experts.inner(*made)  # [.., I]
    x = expert_matmul(x, experts.down, picks, experts.is_down_transposed, in_place)
    x = _with_bias(x, experts.down_bias, picks)
    return x if experts.after is None else experts.after(x)


def _fits_plugin(experts: Experts) -> bool:
    """Whether the plugin takes all matmuls, by float16 matrices of this size."""
    for weight, is_transposed in experts.matrices:
        num_experts, *axes = weight.shape
        num_inputs = axes[0 if is_transposed else 1]
        if num_experts > MAX_EXPERTS or max(axes) > MAX_FEATURES or num_inputs % INPUTS_MULTIPLE:
            return False
    return True


def _with_bias(out: torch.Tensor, bias: torch.Tensor | None, picks: torch.Tensor | None) -> torch.Tensor:
    """Results of `expert_matmul` with each expert's bias, of [E, M]."""
    if bias is None:
        return out
    return out + (bias[:, None] if picks is None else bias.index_select(0, picks))


@torch.library.custom_op("sinkexport::expert_matmul", mutates_args=())
def expert_matmul(
    x: torch.Tensor, weight: torch.Tensor, picks: torch.Tensor | None, is_transposed: bool, in_place: bool = False
) -> torch.Tensor:
    """Matmuls by the matrices of chosen experts, or of all E of them.

    picks: int64 [P]; x [R, K], R dividing P -> [P, M]: row p is row p // (P / R) of x by the matrix of expert picks[p].
    None: x [1 or E, n, K] -> [E, n, M].
    weight: [E, K, M] if `is_transposed`, else [E, M, K]; never transposed. in_place: to be left to a kernel library.
    One node of the trace, so that a pass can find it (graph/expert_matmuls.py).
    """
    if picks is None:
        return x @ weight if is_transposed else (weight @ x.mT).mT.contiguous()
    rows = x.repeat_interleave(len(picks) // len(x), dim=0)  # [P, K]
    chosen = weight.index_select(0, picks)
    out = rows[:, None] @ chosen if is_transposed else (chosen @ rows[..., None]).mT  # [P, 1, M]
    return out[:, 0].contiguous()


@expert_matmul.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, picks: torch.Tensor | None, is_transposed: bool, in_place: bool = False
) -> torch.Tensor:
    width = weight.shape[2 if is_transposed else 1]
    return x.new_empty(*((weight.shape[0], x.shape[1]) if picks is None else picks.shape), width)
