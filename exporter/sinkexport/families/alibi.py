"""Slopes of ALiBi (arXiv:2108.12409), the same in BLOOM, Falcon and MPT."""

from __future__ import annotations

import math

import torch


def slopes(num_heads: int) -> torch.Tensor:
    """float32 [num_heads]: 2^(-8 i / n), i = 1 .. n, for n heads, a power of two.

    For other numbers those of the next lower power of two n, then every second one of 2n. (transformers passes MPT's
    code no other exponent than 8, whatever the configuration says.)
    """
    n = 2 ** math.floor(math.log2(num_heads))
    exponents = [8 * i / n for i in range(1, n + 1)]
    exponents += [8 * i / (2 * n) for i in range(1, 2 * (num_heads - n) + 1, 2)]
    return torch.tensor([2.0**-exponent for exponent in exponents])
