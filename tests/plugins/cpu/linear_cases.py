"""Cases of the CPU's matmuls: what they are given, what they must give, how far off they may be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from plugins.capi.header import values
from tests.plugins.cpu.calls import Call
from tests.plugins.cpu.library import KERNELS
from tests.plugins.cpu.packing import WEIGHT_TYPES, Weight, alternating, random_weight

ACTIVATIONS = values("linear.h", "Activation", KERNELS)
EPSILON = 1e-5
ACTIVATION_GROUP = 32  # inputs that share a scale where all weights of an output do
ROUNDING = 2.0**-24  # of one float32 operation, relative


@dataclass(frozen=True)
class Case:
    """Sizes, the weight's type and what is fused."""

    kind: str
    rows: int
    columns: int  # K
    outputs: int  # N
    block_size: int = 0
    has_zeros: bool = False
    has_half_scales: bool = False
    norm: bool = False
    layer_norm: bool = False  # of `norm`
    norm_bias: bool = False
    bias: bool = False
    residual: bool = False
    activation: str = "none"
    gated: bool = False
    multiplier: float = 1.0
    output_norm: bool = False
    limit: float = 0.0  # of clamped_swiglu

    def __str__(self) -> str:
        words = [self.kind, f"M{self.rows} K{self.columns} N{self.outputs}"]
        words += [f"block{self.block_size}"] if self.block_size else []
        flags = ("has_zeros", "has_half_scales", "norm", "layer_norm", "norm_bias", "bias", "residual", "gated")
        words += [name for name in (*flags, "output_norm") if getattr(self, name)]
        words += [f"x{self.multiplier}"] if self.multiplier != 1.0 else []
        return "-".join([*words, *([self.activation] if self.activation != "none" else [])]).replace(" ", "-")

    @property
    def numbers(self) -> dict[str, float]:
        """Fields of LinearParams that are not pointers."""
        return {
            "num_rows": self.rows,
            "num_inputs": self.columns,
            "num_outputs": self.outputs,
            "weight_type": WEIGHT_TYPES.index(self.kind),
            "block_size": self.block_size,
            "scale_type": int(self.has_half_scales),
            "activation": ACTIVATIONS[self.activation],
            "is_gated": self.gated,
            "is_layer_norm": self.layer_norm,
            "norm_epsilon": EPSILON,
            "activation_limit": self.limit,
            "multiplier": self.multiplier,
            "output_norm_epsilon": EPSILON,
        }


class Problem:
    """A case with numbers: `arrays` for the kernel and float64 for the reference."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        rng = np.random.default_rng([seed, case.rows, case.columns, case.outputs])
        self.case = case
        self.x = rng.standard_normal((case.rows, case.columns)).astype(np.float32)
        make = lambda: random_weight(  # noqa: E731
            rng,
            case.kind,
            case.outputs,
            case.columns,
            case.block_size,
            case.has_zeros,
            np.float16 if case.has_half_scales else np.float32,
        )
        self.weights = [make() for _ in range(2 if case.gated else 1)]
        self.norm = rng.uniform(0.5, 1.5, case.columns).astype(np.float32) if case.norm else None
        self.bias = rng.standard_normal(case.outputs * len(self.weights)).astype(np.float32) if case.bias else None
        shape = (case.rows, case.outputs)
        self.residual = rng.standard_normal(shape).astype(np.float32) if case.residual else None
        self.norm_bias = rng.standard_normal(case.columns).astype(np.float32) if case.norm_bias else None
        self.output_norm = rng.uniform(0.5, 1.5, case.outputs).astype(np.float32) if case.output_norm else None

    def call(self, isa: str, threads: int = 1) -> Call:
        """The same as a call; y begins as NaN."""
        first = self.weights[0]
        packed = (
            alternating(*self.weights)
            if self.case.gated
            else {"weight": first.packed, "scale": first.packed_scales, "zero_point": first.packed_zeros}
        )
        y = np.full((self.case.rows, self.case.outputs), np.nan, np.float32)
        arrays = {"x": self.x, "norm_weight": self.norm, "bias": self.bias, "residual": self.residual, "y": y}
        arrays |= {"norm_bias": self.norm_bias, "output_norm_weight": self.output_norm}
        return Call("linear", self.case.numbers, {**packed, **arrays}, isa, threads)

    def normed(self) -> np.ndarray:
        """x after the norm, float64."""
        x = self.x.astype(np.float64)
        if self.norm is None:
            return x
        if self.case.layer_norm:
            x = x - x.mean(axis=1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPSILON) * self.norm
        return x if self.norm_bias is None else x + self.norm_bias

    def plain(self) -> np.ndarray:
        """The whole in float64 with activations as they are."""
        return self._finish([self.normed() @ weight.values.T for weight in self.weights])

    def rounded(self) -> np.ndarray:
        """The whole with activations rounded to int8 as the kernel rounds them: without a norm to the bit."""
        x = self.normed() if self.norm is not None else self.x
        return self._finish([int_matmul(x.astype(np.float32), weight) for weight in self.weights])

    def _finish(self, sums: list[np.ndarray]) -> np.ndarray:
        if self.bias is not None:
            sums = [one + part for one, part in zip(sums, np.split(self.bias, len(sums)), strict=True)]
        if self.case.activation == "clamped_swiglu":
            gate = np.minimum(sums[0], self.case.limit)
            sums = [gate / (1 + np.exp(-1.702 * gate)), np.clip(sums[1], -self.case.limit, self.case.limit) + 1]
        y = activate(self.case.activation, sums[0])
        if self.case.gated:
            y = y * sums[1]
        y = y * self.case.multiplier
        if self.output_norm is not None:
            y = y / np.sqrt((y**2).mean(axis=1, keepdims=True) + EPSILON) * self.output_norm
        return y if self.residual is None else y + self.residual

    def rounding_of_activations(self) -> np.ndarray:
        """The most that int8 activations can change each sum: half a step of x for every weight."""
        x = self.normed()
        _, scales, group = quantised(x.astype(np.float32), self.weights[0].block_size)
        steps = np.repeat(scales.astype(np.float64), group, axis=1)[:, : x.shape[1]]
        return abs(self.case.multiplier) * 0.5 * steps @ np.abs(self.weights[0].values).T


def quantised(x: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """int8 values [M, K] and scales [M, groups] of x, in the kernel's float32 operations, and the group's size."""
    group = block_size or ACTIVATION_GROUP
    groups = -(-x.shape[1] // group)
    parts = np.pad(x, [(0, 0), (0, groups * group - x.shape[1])]).reshape(x.shape[0], groups, group)
    scales = np.abs(parts).max(axis=2) * np.float32(1 / 127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scales > 0, np.float32(1) / scales, np.float32(0))
    whole = np.rint(np.clip(parts * inverse[..., None], -127, 127)).astype(np.int64)
    return whole.reshape(x.shape[0], -1)[:, : x.shape[1]], scales, group


def int_matmul(x: np.ndarray, weight: Weight) -> np.ndarray:
    """Exact sums of int8 activations and whole weights for each group, scaled and added in float64."""
    assert weight.whole is not None
    assert weight.scales is not None
    whole, scales, group = quantised(x, weight.block_size)
    result = np.zeros((x.shape[0], weight.whole.shape[0]))
    for g in range(scales.shape[1]):
        columns = slice(g * group, (g + 1) * group)
        sums = whole[:, columns] @ weight.whole[:, columns].T
        result += sums * scales[:, g, None].astype(np.float64) * weight.scales[:, g if weight.block_size else 0]
    return result


def activate(name: str, x: np.ndarray) -> np.ndarray:
    """The activation in float64."""
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu":
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "relu2":
        return np.maximum(x, 0) ** 2
    return x


def error(got: np.ndarray, want: np.ndarray) -> float:
    """|got - want| / |want|, or |got| where all of `want` is 0; NaN if any is."""
    return float(np.linalg.norm(got - want) / (np.linalg.norm(want) or 1.0))
