"""The oracle of norms and gates against PyTorch in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.reference.layers import gated_activation, rms_norm

ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def test_rms_norm() -> None:
    random = np.random.default_rng(0)
    x, weight = random.normal(size=(3, 5, 48)) * 100, random.normal(size=48)
    want = torch.nn.functional.rms_norm(torch.from_numpy(x), (48,), torch.from_numpy(weight), eps=0.3)
    np.testing.assert_allclose(rms_norm(x, weight, 0.3), want.numpy(), rtol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activation(activation: str) -> None:
    random = np.random.default_rng(1)
    gate, up = random.normal(size=(2, 4, 64)) * 3, random.normal(size=(2, 4, 64))
    want = ACTIVATIONS[activation](torch.from_numpy(gate)).numpy() * up
    np.testing.assert_allclose(gated_activation(gate, up, activation), want, rtol=1e-10, atol=1e-12)
