"""Rounding of a row of the INT8 window: one token's key or value of one head, written once and never again.

    scale = float16(clamp(max|x| / 127, 2^-17, 65504))        int8 = clip(round_half_even(x / scale), -127, 127)

Symmetric with a scale for each token and head, so that a row depends on no other (as KIVI does for values and KVQuant
for both, arXiv:2402.02750, arXiv:2401.18079). Rows are divided by the scale as it is stored, so its own rounding costs
nothing. From 2^-17 on that rounding is below 2^-8 of it: no entry exceeds 127.5 scales, so none is clipped. Below it
float16 would lose digits, and at 0 divide by nothing; such a row has entries of less than 0.001 and is right to 4e-6.
"""

from __future__ import annotations

import torch

SCALE_DTYPE = torch.float16
INT8_MAX = 127
SMALLEST_SCALE = 2.0**-17
LARGEST_SCALE = 65504.0
"""float16's largest number: rows of up to 8.3 million are represented, larger entries are clipped."""


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [.., D] in floating point -> int8 [.., D] and scales float16 [..]."""
    x = x.float()
    scale = (x.abs().amax(dim=-1) / INT8_MAX).clamp(SMALLEST_SCALE, LARGEST_SCALE).to(SCALE_DTYPE)
    entries = (x / scale.float()[..., None]).round().clamp(-INT8_MAX, INT8_MAX)
    return entries.to(torch.int8), scale


def dequantized(entries: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int8 [.., D] and scales [..] -> [.., D] of `dtype`. Rows never written have a scale of 0, and are 0."""
    return (entries.float() * scale.float()[..., None]).to(dtype)
