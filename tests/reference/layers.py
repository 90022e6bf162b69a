"""The float64 oracle of what lies between matmuls: norms and gates, in the plainest words."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    """x [.., K], weight [K] -> x / sqrt(mean(x^2) + epsilon) * weight (arXiv:1910.07467)."""
    mean = np.square(x.astype(np.float64)).mean(axis=-1, keepdims=True)
    return x / np.sqrt(mean + epsilon) * weight


def gated_activation(gate: Array, up: Array, activation: str) -> Array:
    """activation(gate) * up, of equal shapes. activation: ``silu``, ``gelu`` or ``gelu_tanh`` (arXiv:1606.08415)."""
    x = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        if activation == "silu":
            share = 1 / (1 + np.exp(-x))
        elif activation == "gelu":
            share = np.vectorize(math.erfc, otypes=[np.float64])(-x / math.sqrt(2)) / 2
        else:  # (1 + tanh(y)) / 2, without the cancellation where y is negative
            share = 1 / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x * share * up
