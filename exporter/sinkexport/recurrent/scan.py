"""Recurrences of single numbers over the tokens of a chunk, in log2(T) rounds instead of T dependent steps.

A round combines each token's segment with the one before it, twice as long each time (Hillis and Steele, 1986). Decays
are only multiplied or their logarithms added. Nothing is divided by them, so none can underflow into an infinity.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

NOTHING = -1e30
"""Logarithm of a weight that counts nothing: -inf would give NaN where two of them meet."""


def shifted(x: torch.Tensor, num_tokens: int, fill: float) -> torch.Tensor:
    """x [B, T, ..] of the token `num_tokens` before each; `fill` where there is none in the chunk."""
    before = torch.full_like(x[:, :num_tokens], fill)
    return torch.cat([before, x[:, : x.shape[1] - num_tokens]], dim=1)


def widths(num_tokens: int) -> list[int]:
    """1, 2, 4 .. below the number of tokens."""
    return [1 << i for i in range((num_tokens - 1).bit_length())]


def linear_scan(decay: torch.Tensor, inputs: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """h_t = decay_t h_t-1 + inputs_t for all T tokens.

    decay, inputs: [B, T, N] of one dtype, decay 1 and inputs 0 for what is no token. state: [B, N], h before the chunk.
    Returns: [B, T, N].
    """
    for width in widths(decay.shape[1]):
        inputs = inputs + decay * shifted(inputs, width, 0.0)
        decay = decay * shifted(decay, width, 1.0)
    return inputs + decay * state[:, None]


class Weighted(NamedTuple):
    """A sum of values with weights, and the sum of these weights, both divided by exp(log_scale): [B, T, N] each."""

    log_scale: torch.Tensor
    values: torch.Tensor
    weights: torch.Tensor

    def plus(self, earlier: Weighted, log_decay: torch.Tensor | float) -> Weighted:
        """Both together, the earlier decayed by exp(log_decay), in the larger of both scales."""
        log_scale = torch.maximum(self.log_scale, earlier.log_scale + log_decay)
        old = torch.exp(earlier.log_scale + log_decay - log_scale)
        new = torch.exp(self.log_scale - log_scale)
        return Weighted(log_scale, new * self.values + old * earlier.values, new * self.weights + old * earlier.weights)


def weighted_scan(log_decay: torch.Tensor, tokens: Weighted, state: Weighted) -> Weighted:
    """Sums after each of T tokens, each sum decayed by exp(log_decay) before a token is added.

    log_decay: [B, T, N]; 0 for what is no token, whose log_scale is NOTHING and whose values and weights are 0.
    state: [B, 1, N] each, the sums before the chunk.
    """
    for width in widths(log_decay.shape[1]):
        before = Weighted(
            shifted(tokens.log_scale, width, NOTHING),
            shifted(tokens.values, width, 0.0),
            shifted(tokens.weights, width, 0.0),
        )
        tokens = tokens.plus(before, log_decay)
        log_decay = log_decay + shifted(log_decay, width, 0.0)
    return tokens.plus(state, log_decay)
