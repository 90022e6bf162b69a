"""Weights rounded so that what a layer gives changes least, not the weights: GPTQ (arXiv:2210.17323).

Weights that are not rounded yet make up for the error of those of the same output that are. They can as far as
their inputs go along with each other: that is what the inputs' second moments say. Scales and zero points are chosen
when their block's turn has come, so for weights that have already been changed. What decides is the error weighted
with the inputs' sizes.

The moments must hold the sinks: they are one token in a thousand, but a hundred times larger, and what they lose all
later tokens attend to. Left out, the errors of all others are pushed just where the sinks feel them.
"""

from __future__ import annotations

import torch

from sinkexport.quant.weight import CLIPPINGS, Rounded, WeightScheme

DAMPING = 0.01
"""Share of the mean of the moments' diagonal that is added to it: inputs that hardly ever vary say nothing."""

COLUMNS_AT_ONCE = 64
"""Inputs whose errors are passed on within a strip at once, and then to all that follow."""


def rounded_for_inputs(weight: torch.Tensor, moments: torch.Tensor, scheme: WeightScheme) -> Rounded:
    """Round a matrix for inputs x with these second moments.

    weight: [N, K], any floating-point type. moments: float64 [K, K], the mean or the sum of x x^T.
    """
    weight = weight.detach().to(torch.float32).clone()
    num_outputs, num_inputs = weight.shape
    block = scheme.block_size or num_inputs
    sizes = moments.diagonal().to(torch.float32)  # [K]
    spread = _spread_of_errors(moments).to(torch.float32)  # [K, K], upper triangle
    groups = -(-num_inputs // block)
    scales, zeros = torch.empty(num_outputs, groups), torch.zeros(num_outputs, groups)
    integers = torch.empty(num_outputs, num_inputs)
    for start in range(0, num_inputs, COLUMNS_AT_ONCE):
        strip = slice(start, min(start + COLUMNS_AT_ONCE, num_inputs))
        errors = torch.zeros(num_outputs, strip.stop - start)
        for i in range(start, strip.stop):
            group = i // block
            if i % block == 0:
                # Errors of this strip have reached this strip alone: a block that goes beyond it gets them now.
                own = weight[:, i : i + block].clone()
                beyond = slice(strip.stop, min(i + block, num_inputs))
                if beyond.start < beyond.stop:
                    own[:, beyond.start - i :] -= errors @ spread[strip, beyond]
                scales[:, group], zeros[:, group] = _grid(own, sizes[i : i + block], scheme)
            scale, zero = scales[:, group], zeros[:, group]
            column = weight[:, i]
            integers[:, i] = ((column / scale).round() + zero).clamp(scheme.lowest, scheme.highest)
            error = (column - (integers[:, i] - zero) * scale) / spread[i, i]
            errors[:, i - start] = error
            weight[:, i : strip.stop] -= error[:, None] * spread[i, i : strip.stop]
        weight[:, strip.stop :] -= errors @ spread[strip, strip.stop :]
    if scheme.symmetric:
        return Rounded(integers.to(torch.int8).numpy(), scales.numpy(), None)
    return Rounded(integers.to(torch.uint8).numpy(), scales.numpy(), zeros.to(torch.uint8).numpy())


def _spread_of_errors(moments: torch.Tensor) -> torch.Tensor:
    """float64 [K, K], U with U^T U the inverse of the damped moments: row i says where the error of input i goes."""
    damped = moments.to(torch.float64).clone()
    diagonal = damped.diagonal()
    # An input that was never anything but 0 has no say, and no error to pass on.
    diagonal += torch.clamp(DAMPING * diagonal.mean(), min=torch.finfo(torch.float32).tiny)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def _grid(values: torch.Tensor, sizes: torch.Tensor, scheme: WeightScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point [N] each for values [N, n], by the squared error weighted with `sizes` [n]."""
    low, high = values.amin(dim=1).clamp(max=0), values.amax(dim=1).clamp(min=0)  # zero has to be exact
    if scheme.symmetric:
        finest = torch.maximum(low / scheme.lowest, high / scheme.highest)
    else:
        finest = (high - low) / scheme.highest
    tiny = torch.finfo(torch.float32).tiny
    finest = torch.where(finest < tiny, torch.ones_like(finest), finest)
    best_error = torch.full_like(finest, torch.inf)
    best_scale, best_zero = finest.clone(), torch.zeros_like(finest)
    for share in CLIPPINGS:
        scale = finest * share
        exact = torch.zeros_like(finest) if scheme.symmetric else -low * share / scale
        for zero in (exact,) if scheme.symmetric else (exact.floor(), exact.ceil()):
            zero = zero.clamp(0, scheme.highest)
            integers = ((values / scale[:, None]).round() + zero[:, None]).clamp(scheme.lowest, scheme.highest)
            error = (((integers - zero[:, None]) * scale[:, None] - values).square() * sizes).sum(dim=1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero
