"""GPTQ against a float64 form of it that solves for each next weight anew, and against rounding to the nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sinkexport.graph.passes.quantized_weight import Rounded, WeightScheme
from sinkexport.quant.gptq import DAMPING, rounded_for_inputs

SCHEMES = [
    WeightScheme(4, 32, symmetric=False),
    WeightScheme(4, 32),
    WeightScheme(4, 16, symmetric=False),
    WeightScheme(4, 128, symmetric=False),  # goes beyond a strip
    WeightScheme(4),
    WeightScheme(8, 32),
    WeightScheme(8),
]


def dequantized(found: Rounded, block: int) -> np.ndarray:
    zeros = np.zeros_like(found.scales) if found.zero_points is None else found.zero_points.astype(np.float64)
    spread = [np.repeat(part.astype(np.float64), block, axis=1) for part in (found.scales, zeros)]
    scale, zero = (part[:, : found.integers.shape[1]] for part in spread)
    return scale * (found.integers.astype(np.float64) - zero)


def moments_of(rng: np.random.Generator, num_inputs: int) -> np.ndarray:
    """Of inputs that go along with each other, as those of layers do."""
    mixed = rng.standard_normal((2 * num_inputs, num_inputs // 4)) @ rng.standard_normal((num_inputs // 4, num_inputs))
    x = mixed + 0.3 * rng.standard_normal(mixed.shape)
    return x.T @ x / len(x)


def case(seed: int, num_outputs: int, num_inputs: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((num_outputs, num_inputs)).astype(np.float32), moments_of(rng, num_inputs)


def output_error(weight: np.ndarray, found: np.ndarray, moments: np.ndarray) -> float:
    difference = found - weight
    return float(np.einsum("nk,kl,nl->", difference, moments, difference))


def best_of_the_rest(weight: np.ndarray, fixed: np.ndarray, moments: np.ndarray, i: int) -> np.ndarray:
    """Weights i .. K-1 that make the error least once 0 .. i-1 are `fixed` [N, i]: from the normal equations."""
    done, rest = slice(0, i), slice(i, None)
    wanted = moments[rest, done] @ (weight[:, done] - fixed).T
    return weight[:, rest] + np.linalg.solve(moments[rest, rest], wanted).T


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_each_weight_is_the_nearest_integer_to_what_the_normal_equations_want(scheme: WeightScheme) -> None:
    num_inputs = 144
    weight, moments = case(0, 5, num_inputs)
    found = rounded_for_inputs(torch.from_numpy(weight), torch.from_numpy(moments), scheme)
    block = scheme.block_size or num_inputs
    values = dequantized(found, block)
    damped = moments + DAMPING * moments.diagonal().mean() * np.eye(num_inputs)
    for i in range(num_inputs):
        wanted = best_of_the_rest(weight.astype(np.float64), values[:, :i], damped, i)[:, 0]
        scale = found.scales[:, i // block].astype(np.float64)
        zero = 0.0 if found.zero_points is None else found.zero_points[:, i // block].astype(np.float64)
        integers = np.clip(np.rint(wanted / scale) + zero, scheme.lowest, scheme.highest)
        # Where two integers are as near, float32 may take the other.
        is_tie = np.abs(np.abs(wanted / scale - np.floor(wanted / scale)) - 0.5) < 1e-3
        assert ((integers == found.integers[:, i]) | is_tie).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_outputs_change_less_than_with_rounding_to_the_nearest(scheme: WeightScheme) -> None:
    weight, moments = case(1, 64, 256)
    block = scheme.block_size or 256
    found = rounded_for_inputs(torch.from_numpy(weight), torch.from_numpy(moments), scheme)
    plain = rounded_for_inputs(torch.from_numpy(weight), torch.eye(256, dtype=torch.float64), scheme)
    ours, nearest = (output_error(weight, dequantized(x, block), moments) for x in (found, plain))
    assert ours < 0.6 * nearest


def test_without_correlations_it_is_rounding_to_the_nearest() -> None:
    weight, _ = case(2, 16, 128)
    found = rounded_for_inputs(torch.from_numpy(weight), torch.eye(128, dtype=torch.float64), WeightScheme(8, 32))
    scale = np.repeat(found.scales, 32, axis=1)
    exact = weight / scale
    assert np.abs(np.clip(exact, -127, 127) - found.integers).max() <= 0.5 + 1e-4


def test_inputs_and_outputs_that_are_always_zero_do_no_harm() -> None:
    weight, moments = case(3, 8, 64)
    weight[3] = 0
    moments[10], moments[:, 10] = 0, 0
    for scheme in (WeightScheme(4, 32, symmetric=False), WeightScheme(4, 32)):
        found = rounded_for_inputs(torch.from_numpy(weight), torch.from_numpy(moments), scheme)
        values = dequantized(found, 32)
        assert np.isfinite(values).all()
        assert (found.scales > 0).all()
        assert np.abs(values[3]).max() == 0
    all_zero = rounded_for_inputs(torch.from_numpy(weight), torch.zeros(64, 64, dtype=torch.float64), scheme)
    assert np.isfinite(dequantized(all_zero, 32)).all()
