"""A family's own attention and rotation, called from its own source file, for what bundles are compared with."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from sinkrt.contract import ActTuning
from sinkrt.errors import UsageError, problem


def plain_attention(module: torch.nn.Module) -> Callable[..., Any]:
    """The family's own attention function, from logits to output, without kernels of its own."""
    return own_function(module, "eager_attention_forward", _adapted_attention)


def own_function(module: torch.nn.Module, name: str, default: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """A function of the source file in which the module's class is."""
    source = sys.modules[type(module).__module__]
    function: Callable[..., Any] | None = getattr(source, name, default)
    if function is None:
        raise no_reference(f"{source.__name__} without {name}()", "a family built like Llama")
    return function


def _adapted_attention(
    _module: torch.nn.Module,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    alibi_slopes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a family that has no such function: q [B, Hq, T, D] over [B, Hkv, n, D] -> [B, T, Hq, D], weights.

    mask: added to the logits. alibi_slopes: [Hq], by in-cache distance: what is left out is the same for all keys.
    """
    keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (keys, values))
    logits = q @ keys.mT * scaling  # [B, Hq, 1, n]
    if alibi_slopes is not None:
        places = torch.arange(keys.shape[2])
        logits = logits + alibi_slopes.view(-1, 1, 1) * (places - places[-1])
    logits = logits if mask is None else logits + mask
    weights = logits.softmax(dim=-1)
    return (weights.to(values.dtype) @ values).transpose(1, 2), weights


def rotate_own(module: torch.nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B, H, n, D] by the family's own function; cos, sin: [1, n, ..]."""
    apply = own_function(module, "apply_rotary_pos_emb")
    turned: torch.Tensor
    if list(inspect.signature(apply).parameters)[1] == "cos":
        turned = apply(x, cos, sin)
    else:
        _, turned = apply(x[:, :0], x, cos, sin)  # takes queries and keys: no queries here
    return turned


class Recorder:
    """An attention function that writes down queries and keys and returns zeros."""

    def __init__(self) -> None:
        self.given: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(
        self, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        if module in self.given:
            raise no_reference("layers that share one attention module, or two calls in one", "one call for each layer")
        for name, x in (("queries", q), ("keys", k)):
            if not bool(x.any()):
                raise no_reference(f"{name} that are all zero in layer {module.layer_idx}", "weights that are not zero")
        self.given[module] = q, k
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3]), None  # [B, n, Hq, Dv]


class NoRotation(torch.nn.Module):
    """A rotary embedding that turns nothing, with cos and sin shaped as the original's."""

    def __init__(self, original: torch.nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.original(*args, **kwargs)
        return torch.ones_like(cos), torch.zeros_like(sin)


def calibration(
    act: ActTuning, layer: int, weights: torch.Tensor, received: torch.Tensor, queries: torch.Tensor, num_sinks: int
) -> torch.Tensor:
    """Factors float64 [B, Hq, T, n] on the weights [B, Hq, T, n] of T queries, each of the oldest tokens it sees.

    received: float64 [B, Hq, T, n], what each token has received until then, by so many queries, [T, n], 0 where it is
    not seen. The factors leave the sum of the weights as it is: it is no matter that weights are normalised after them.
    """
    num_tokens = (queries > 0).sum(dim=-1, keepdim=True)  # [T, 1]
    degree = (received / queries.clamp(min=1) * num_tokens / act.alpha - 1).clamp(0, 1)
    degree[..., :num_sinks] = 0
    degree[..., queries < act.min_queries] = 0
    degree[:, ~torch.tensor(act.heads[layer])] = 0
    sinks, others = ((part * weights).sum(dim=-1, keepdim=True) for part in (degree, 1 - degree))
    return act.beta * degree + (1 - degree) * (1 + (1 - act.beta) * sinks / others)


def no_reference(received: str, expected: str) -> UsageError:
    """A refusal to compare anything with a model."""
    return UsageError(
        problem("model", received=received, expected=expected, fix="there is no streaming reference for this model")
    )
