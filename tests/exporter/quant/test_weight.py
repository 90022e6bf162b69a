"""Weights as integers: against a float64 computation of its own and against onnxruntime's quantiser."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from onnxruntime.capi import _pybind_state as ort_quantizer
from sinkexport.graph.edit import lazy_weight
from sinkexport.quant.weight import CLIPPINGS, QuantizedWeight, WeightScheme
from sinkrt.errors import UsageError

SCHEMES = [
    WeightScheme(bits, block, symmetric, scales)  # type: ignore[arg-type]
    for bits, block, symmetric, scales in itertools.product((8, 4), (None, 16), (True, False), ("absmax", "mse"))
]


def name_of(scheme: WeightScheme) -> str:
    kind = "symmetric" if scheme.symmetric else "asymmetric"
    return f"{scheme.bits}-{scheme.block_size or 'channel'}-{kind}-{scheme.scales}"


def random_weight(num_outputs: int, num_inputs: int, seed: int = 0) -> np.ndarray:
    """[N, K] with outliers, an all-zero row, and rows of one sign."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((num_outputs, num_inputs)) * np.exp(rng.standard_normal((num_outputs, 1)))
    weight[rng.random(weight.shape) < 0.01] *= 8.0
    weight[0] = 0.0
    weight[1], weight[2] = np.abs(weight[1]), -np.abs(weight[2])
    return weight.astype(np.float32)


def quantized(weight: np.ndarray, scheme: WeightScheme, *, transposed: bool = True, **rest: object) -> QuantizedWeight:
    """Quantised weight [N, K]; not transposed: handed over as [K, N]."""
    source = weight if transposed else np.ascontiguousarray(weight.T)
    return QuantizedWeight("w", ir.Tensor(source), scheme, transposed, **rest)  # type: ignore[arg-type]


def groups_of(weight: np.ndarray, scheme: WeightScheme) -> list[tuple[int, int, np.ndarray]]:
    """(output, group, its weights in float64), one at a time: slow and plain."""
    size = scheme.block_size or weight.shape[1]
    return [
        (n, start // size, weight[n, start : start + size].astype(np.float64))
        for n in range(weight.shape[0])
        for start in range(0, weight.shape[1], size)
    ]


def brute_force(values: np.ndarray, scheme: WeightScheme, share: float) -> tuple[float, int, np.ndarray]:
    """(scale, zero point, integers) of one group in float64."""
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    if scheme.symmetric:
        scale = max(low / (-127 if scheme.bits == 8 else -8), high / (127 if scheme.bits == 8 else 7))
        zero, bounds = 0, (-127, 127) if scheme.bits == 8 else (-8, 7)
    else:
        top = 2**scheme.bits - 1
        scale = (high - low) / top
        zero, bounds = int(np.clip(np.rint(-low / (scale or 1.0)), 0, top)), (0, top)
    scale = scale * share or 1.0
    return scale, zero, np.clip(np.rint(values / scale) + zero, *bounds)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.scales == "absmax"], ids=name_of)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", [(40, 48), (3, 16), (5, 37)], ids=str)
def test_absmax_is_the_brute_force(scheme: WeightScheme, transposed: bool, shape: tuple[int, int]) -> None:
    weight = random_weight(*shape)
    q = quantized(weight, scheme, transposed=transposed)
    integers, scales, zeros = q.integers(), q.scales(), q.zero_points()
    assert integers.shape == shape and integers.flags.c_contiguous
    assert scales.shape == (shape[0], q.num_groups) and scales.dtype == np.float32 and (scales > 0).all()
    assert (zeros is None) == scheme.symmetric
    for n, g, values in groups_of(weight, scheme):
        scale, zero, expected = brute_force(values, scheme, 1.0)
        start = g * q.group_size
        found = integers[n, start : start + len(values)].astype(np.int64)
        np.testing.assert_allclose(scales[n, g], scale, rtol=3e-7)
        if zeros is not None:
            assert zeros[n, g] == zero
        # Where float64 lies on the edge between two integers, float32 may fall on either side.
        exact = values / scale
        on_the_edge = np.abs(exact - np.floor(exact) - 0.5) < 1e-4
        assert (found == expected)[~on_the_edge].all()
        assert (np.abs(found - expected) <= 1).all()


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.scales == "mse"], ids=name_of)
def test_mse_beats_every_clipping(scheme: WeightScheme) -> None:
    weight = random_weight(24, 64, seed=1)
    q = quantized(weight, scheme)
    restored, gained = q.dequantized().astype(np.float64), 0
    for n, g, values in groups_of(weight, scheme):
        start = g * q.group_size
        error = np.square(restored[n, start : start + len(values)] - values).sum()
        candidates = []
        for share in CLIPPINGS:
            scale, zero, integers = brute_force(values, scheme, share)
            candidates.append(np.square((integers - zero) * scale - values).sum())
        assert error <= min(candidates) * (1 + 1e-3) + 1e-12
        gained += error < 0.999 * candidates[0]
    assert gained > 0.5 * weight.shape[0]  # it is worth its time


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_dequantized_is_the_formula_and_near_the_weights(scheme: WeightScheme) -> None:
    weight = random_weight(20, 40)
    q = quantized(weight, scheme)
    scales = np.repeat(q.scales(), q.group_size, axis=1)[:, :40]
    zeros = q.zero_points()
    integers = q.integers().astype(np.float32)
    if zeros is not None:
        integers -= np.repeat(zeros, q.group_size, axis=1)[:, :40]
    np.testing.assert_array_equal(q.dequantized(), integers * scales)
    if scheme.scales == "absmax":
        # A rounded zero point moves the range by up to half a step, which may clip its end by that much.
        assert (np.abs(q.dequantized() - weight) <= scales * (0.5001 if scheme.symmetric else 1.0001)).all()
    assert (q.dequantized()[0] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_asymmetric_blocks_are_those_of_onnxruntime(bits: int, block_size: int) -> None:
    weight = random_weight(37, 256, seed=2)[3:]  # it takes a row of one sign differently: range without zero
    found = quantized(weight, WeightScheme(bits, block_size, symmetric=False))  # type: ignore[arg-type]
    integers, scales, zeros = of_onnxruntime(weight, bits, block_size, symmetric=False)
    np.testing.assert_allclose(found.scales(), scales, rtol=1e-6)
    assert zeros is not None and found.zero_points() is not None
    agree(found.zero_points(), zeros)  # type: ignore[arg-type]
    agree(found.integers()[:, : weight.shape[1]], integers)


def test_symmetric_blocks_are_those_of_onnxruntime_where_its_scale_is_positive() -> None:
    """It maps the weight furthest from zero to -8; so do we if that is negative and no positive one is near it."""
    weight = random_weight(32, 128, seed=3)
    blocks = weight.reshape(32, -1, 32)
    blocks[..., 5] = -1.3 * np.abs(blocks).max(axis=-1) - 0.1
    found = quantized(weight, WeightScheme(4, 32))
    integers, scales, _ = of_onnxruntime(weight, 4, 32, symmetric=True)
    np.testing.assert_allclose(found.scales(), scales, rtol=1e-6)
    agree(found.integers(), integers.astype(np.int64) - 8)


def test_symmetric_4_bits_are_finer_than_minus_7_to_7_and_never_coarser() -> None:
    weight = random_weight(64, 256, seed=4)[1:]
    scales = quantized(weight, WeightScheme(4, 32)).scales()
    narrow = np.abs(weight.reshape(63, -1, 32)).max(axis=-1) / 7
    assert (scales <= narrow * (1 + 1e-6)).all()
    assert (scales < 0.95 * narrow).mean() > 0.3


def of_onnxruntime(
    weight: np.ndarray, bits: int, block_size: int, *, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(integers [N, K] uint8, scales [N, G], zero points [N, G]) by onnxruntime's quantiser."""
    num_outputs, num_inputs = weight.shape
    groups = -(-num_inputs // block_size)
    per_byte = 8 // bits
    packed = np.zeros((num_outputs, groups, block_size // per_byte), np.uint8)
    scales = np.zeros((num_outputs * groups,), np.float32)
    zeros = np.zeros((num_outputs, -(-groups // per_byte)), np.uint8)
    quantize = getattr(ort_quantizer, f"quantize_matmul_{bits}bits")
    source = np.ascontiguousarray(weight.T)
    quantize(packed, source, scales, zeros, block_size, num_outputs, num_inputs, symmetric)
    integers = unpacked(packed, bits).reshape(num_outputs, -1)[:, :num_inputs]
    return integers, scales.reshape(num_outputs, groups), None if symmetric else unpacked(zeros, bits)[:, :groups]


def unpacked(values: np.ndarray, bits: int) -> np.ndarray:
    """Low nibble first."""
    if bits == 8:
        return values
    return np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], -1)


def agree(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for ties: onnxruntime multiplies by a reciprocal and rounds half away from zero."""
    difference = np.abs(found.astype(np.int64) - expected.astype(np.int64))
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.995


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_orientation_and_slices_change_nothing(scheme: WeightScheme) -> None:
    weight = random_weight(150, 48, seed=6)
    whole = quantized(weight, scheme)
    sliced = quantized(weight, scheme, transposed=False, slice_elements=1)
    np.testing.assert_array_equal(sliced.integers(), whole.integers())
    np.testing.assert_array_equal(sliced.scales(), whole.scales())


def test_float16_scales_are_the_ones_that_integers_were_computed_with() -> None:
    weight = (random_weight(16, 64, seed=7) * 1e-3).astype(np.float16)
    q = quantized(weight, WeightScheme(8, scale_dtype="float16"))
    assert q.scales().dtype == np.float16
    exact = weight.astype(np.float64) / q.scales().astype(np.float64)
    np.testing.assert_allclose(q.integers(), np.clip(exact, -127, 127), atol=0.5001)


def test_tiny_and_huge_weights() -> None:
    weight = np.full((4, 16), 1e-45, np.float32)  # subnormal: no scale can be
    weight[1], weight[2], weight[3] = 3e38, -1e-30, 0.0
    for scheme in SCHEMES:
        q = quantized(weight, scheme)
        assert np.isfinite(q.scales()).all() and (q.scales() > 0).all()
        np.testing.assert_allclose(q.dequantized(), weight, rtol=1e-2, atol=1e-37)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_weights_that_are_no_numbers_are_named(bad: float, scheme: WeightScheme) -> None:
    weight = random_weight(8, 32)
    weight[3, 7] = bad
    for ask in ("scales", "zero_points", "integers"):
        with pytest.raises(UsageError, match=r"^weights 'w': received NaN or Inf, expected finite"):
            getattr(quantized(weight, scheme), ask)()


def test_nothing_is_read_before_it_is_needed() -> None:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24})
    reads: list[int] = []

    def make() -> np.ndarray:
        reads.append(1)
        return random_weight(6, 32).T.copy()

    value = lazy_weight(graph, "lazy", ir.DataType.FLOAT, (32, 6), make)
    assert value.const_value is not None
    q = QuantizedWeight("lazy", value.const_value, WeightScheme(4, 16, symmetric=False))
    assert (q.name, q.num_outputs, q.num_inputs, q.num_groups) == ("lazy", 6, 32, 2)
    assert not reads
    q.scales(), q.zero_points(), q.scales()
    assert len(reads) == 1
    q.integers()
    assert len(reads) == 2
