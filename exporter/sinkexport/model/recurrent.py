"""Linear attention as a traced graph computes it: explicit states of fixed size, and the gated delta rule in chunks.

Which layers these are, and how transformers keeps their states: `sinkexport.families.linear_attention`.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from sinkrt.errors import UsageError, problem


class StepCache:
    """Stands in for transformers' cache while T tokens of each of B streams are traced.

    states: by layer, its ``conv`` [B, channels, kernel] and ``recurrent`` [B, Hv, Dk, Dv]. after: what became of them.
    is_token: bool [B, T]; what is none leaves the states as they are. num_valid: int64 [1], how many are, where T > 1:
    they come first, and B is 1.
    """

    def __init__(
        self, states: Mapping[int, Mapping[str, torch.Tensor]], is_token: torch.Tensor, num_valid: torch.Tensor | None
    ) -> None:
        self._before = states
        self._is_token = is_token
        self._num_valid = num_valid
        # The step writes the convolution's state in place, which a graph's input does not allow.
        self.after = {layer: {kind: state.clone() for kind, state in one.items()} for layer, one in states.items()}

    def finish(self) -> None:
        """Undo what a step made of the convolutions' states in streams that have no token."""
        if self._num_valid is None:
            for layer, after in self.after.items():
                after["conv"] = torch.where(self._is_token[..., None], after["conv"], self._before[layer]["conv"])

    def update(self, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax attention keeps its tokens elsewhere."""
        return k, v

    def get_seq_length(self, *_: Any) -> int:
        """Positions are given."""
        return 0

    def is_recording_past(self, _layer: int) -> bool:
        """No."""
        return False

    def get_conv_state(self, layer: int, state_idx: int = 0) -> torch.Tensor:  # noqa: ARG002
        """Hand out the convolution's state, which a step writes in place."""
        return self.after[layer]["conv"]

    def update_conv_state(self, inputs: torch.Tensor, layer: int, **_: Any) -> torch.Tensor:
        """inputs [1, channels, T] of a chunk -> [1, channels, kernel + T], what came before included."""
        before = self._before[layer]["conv"]
        seen = torch.cat([before, inputs.to(before.dtype)], dim=-1)
        if self._num_valid is None:
            raise RuntimeError("a chunk without a number of valid tokens")
        self.after[layer]["conv"] = seen.index_select(-1, self._num_valid + torch.arange(before.shape[-1]))
        return seen

    def get_recurrent_state(self, layer: int, state_idx: int = 0) -> torch.Tensor:  # noqa: ARG002
        """Hand out the recurrent state."""
        return self.after[layer]["recurrent"]

    def update_recurrent_state(self, state: torch.Tensor, layer: int, **_: Any) -> torch.Tensor:
        """The state after the tokens."""
        self.after[layer]["recurrent"] = state
        return state


_STEP_RULE, _CHUNK_RULE = "torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"
"""Names of the two forms in each family's own module of transformers."""


@contextlib.contextmanager
def delta_rules(model: Any, is_token: torch.Tensor) -> Iterator[None]:
    """Make the model's linear layers skip what is no token, and compute chunks by `chunk_gated_delta_rule`.

    It lasts as long as the context. is_token: bool [B, T].

    Raises: UsageError for a model whose linear layers have other rules.
    """
    names = {type(module).__module__ for module in model.modules()}
    modules = [found for found in (sys.modules[name] for name in sorted(names)) if hasattr(found, _CHUNK_RULE)]
    if not modules:
        raise UsageError(
            problem(
                "model",
                received="linear attention by a rule of its own",
                expected="a gated delta rule",
                fix="this model cannot be exported exactly",
            )
        )
    masks = DecayMasks(is_token.shape[1])

    def passing_over(rule: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, **named: Any) -> Any:
            counts = is_token[..., None]  # no decay and no update for what does not count
            return rule(*arguments, g=g * counts.to(g.dtype), beta=beta * counts.to(beta.dtype), **named)

        return run

    with contextlib.ExitStack() as patches:
        for module in modules:
            step = getattr(module, _STEP_RULE)
            chunk = functools.partial(chunk_gated_delta_rule, masks=masks)
            patches.enter_context(mock.patch.object(module, _STEP_RULE, passing_over(step)))
            patches.enter_context(mock.patch.object(module, _CHUNK_RULE, passing_over(chunk)))
        yield


class DecayMasks:
    """Constants of a chunk of T tokens, the same in all layers: float32 [T, T]."""

    def __init__(self, num_tokens: int) -> None:
        row, column = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)
        self.causal, self.later = (row >= column).float(), (row > column).float()
        widths = [1 << i for i in range((num_tokens - 1).bit_length())]
        self.below = [((row // w % 2 == 1) & (column // w == row // w - 1)).float() for w in widths]
        """Lower left block of every pair of diagonal blocks of a width, by width."""


def chunk_gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    masks: DecayMasks,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """T tokens of the gated delta rule at once (arXiv:2412.06464, the chunkwise form), in float32.

    Every token t decays the state S by exp(g_t), then writes beta_t (v_t - S^T k_t) to where k_t points, then reads
    S^T q_t. With what it writes as row u_t and the decay since token j as d_tj = exp(g_j+1 + .. + g_t):
    u_t = beta_t (v_t - d_t0 S_0^T k_t - sum over j < t of d_tj (k_t . k_j) u_j), a unit lower triangular system.
    transformers' own form solves it row by row in a graph: T dependent nodes a layer. Here the inverse is put together
    from those of diagonal blocks, twice as wide each time, which takes log2(T) rounds and is as stable.

    query, key: [B, T, Hk, Dk]; value: [B, T, Hv, Dv], Hv a multiple of Hk; g, beta: [B, T, Hv]; initial_state: [B, Hv,
    Dk, Dv]. Returns: [B, T, Hv, Dv] of the query's type, and the state after the last token.
    """
    dtype, repeats = query.dtype, value.shape[2] // key.shape[2]
    if repeats != 1:
        query, key = (x.repeat_interleave(repeats, dim=2) for x in (query, key))
    q, k, v = (x.transpose(1, 2).float() for x in (query, key, value))  # [B, Hv, T, D]
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    rate = beta.transpose(1, 2).float()[..., None]  # [B, Hv, T, 1]
    logs = g.transpose(1, 2).float()[..., None]  # [B, Hv, T, 1]
    since_start = torch.exp(masks.causal @ logs)  # d_t0
    # d_tj, [B, Hv, T, T]: sums of their own, since differences of long sums would lose digits.
    since = torch.exp(masks.causal @ (logs * masks.later)) * masks.causal
    state = initial_state.float()

    system = rate * (k @ k.mT) * since
    inverse = torch.eye(g.shape[1])
    for below in masks.below:
        # [[A, 0], [C, B]] has the inverse [[A', 0], [-B' C A', B']].
        inverse = inverse - (inverse @ (system * below) @ inverse)
    # One matmul, so that the new state comes after all that read the old one: they share a buffer.
    seen_by_k, seen_by_q = (torch.cat([k, q], dim=2) @ state).split(g.shape[1], dim=2)
    written = inverse @ (rate * (v - since_start * seen_by_k))
    out = since_start * seen_by_q + ((q @ k.mT) * since) @ written
    after = since_start[:, :, -1:] * state + (k * since[:, :, -1:].mT).mT @ written
    return out.transpose(1, 2).to(dtype), after
