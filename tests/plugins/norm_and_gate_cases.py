"""What norms and gates must give, of whatever runs them: awkward sizes against the float64 oracle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from plugins.capi.header import ACTIVATIONS, DTYPES
from plugins.capi.kernels import GatedActivationParams, RmsNormParams
from tests.plugins.norm_and_gate_library import NormAndGate
from tests.reference.layers import gated_activation, rms_norm

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
HALF_ULP = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Largest relative error of one rounding."""
TINIEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133}
FLOAT32 = 1e-6
"""Relative error of float32 arithmetic, in whatever order."""

Place = Callable[[torch.Tensor], torch.Tensor]
"""Brings a tensor to where the kernels see it."""


@dataclasses.dataclass(frozen=True)
class NormCase:
    """num_rows x row_length; largest: of a massive activation in each row; 0: none."""

    num_rows: int
    row_length: int
    dtype: str = "float16"
    residual: bool = True
    float_weight: bool = False
    largest: float = 0.0

    def check(self, library: NormAndGate, place: Place, stream: int = 0) -> None:
        random = torch.Generator().manual_seed(self.num_rows * 7919 + self.row_length)
        half, shape = HALVES[self.dtype], (self.num_rows, self.row_length)
        x, residual = (torch.randn(shape, generator=random).to(half) for _ in range(2))
        if self.largest:
            x[:, 3] = self.largest
            residual[:, 3] = self.largest / 64 + 1
        weight = torch.randn(self.row_length, generator=random) + 1
        weight = weight if self.float_weight else weight.to(half)
        x, residual, weight = (place(tensor) for tensor in (x, residual, weight))
        y, total = (place(torch.full(shape, float("nan"), dtype=half)) for _ in range(2))
        epsilon = 0.25
        params = RmsNormParams(
            *shape,
            DTYPES[self.dtype],
            self.float_weight,
            epsilon,
            x.data_ptr(),
            weight.data_ptr(),
            residual.data_ptr() if self.residual else 0,
            y.data_ptr(),
            total.data_ptr() if self.residual else 0,
        )
        assert library.norm.problem(params) is None
        assert library.norm.launch(params, stream) == 0
        h = x
        if self.residual:
            h = (x.double() + residual.double()).to(half)  # exact, then rounded once
            assert torch.equal(total, h)
        else:
            assert total.isnan().all()
        factors = as_float64(weight)
        normal = rms_norm(as_float64(h), np.ones(self.row_length), epsilon)
        want = (normal if self.float_weight else rounded(normal, half)) * factors
        limit = np.abs(want) * (HALF_ULP[self.dtype] * 1.01 + FLOAT32) + TINIEST[self.dtype]
        # Where float32 and float64 fall on two sides of a tie, the first rounding differs by its last bit.
        tipped = np.abs(as_float64(y) - rounded(want, half)) > 0
        assert tipped.sum() <= 1 + 0.01 * tipped.size
        limit[tipped] += np.abs(want[tipped]) * 2 * HALF_ULP[self.dtype] + TINIEST[self.dtype] * np.abs(factors).max()
        error = np.abs(as_float64(y) - want)
        assert (error <= limit).all(), float((error / limit).max())


NORM_CASES = [
    NormCase(1, 32768, dtype="bfloat16", largest=1e4),  # first: what it leaves behind must not matter to the others
    *(NormCase(rows, 64) for rows in (1, 3, 4, 5)),  # four short rows share a block
    NormCase(2, 8),
    NormCase(5, 256, float_weight=True, residual=False),
    NormCase(3, 264, dtype="bfloat16"),  # a second warp with one thread at work
    NormCase(2, 576),
    NormCase(2, 4096, largest=6e4),  # its square overflows float16, and its sum with the residual almost does
    NormCase(2, 4096, dtype="bfloat16", float_weight=True),
    NormCase(1, 8200, residual=False),  # a second piece for one thread
    NormCase(1, 16392, float_weight=True),  # a third
]


@dataclasses.dataclass(frozen=True)
class GateCase:
    """merged: rows are gate | up."""

    num_rows: int
    width: int
    activation: str = "silu"
    dtype: str = "float16"
    merged: bool = True

    def check(self, library: NormAndGate, place: Place, stream: int = 0) -> None:
        random = torch.Generator().manual_seed(self.num_rows * 7919 + self.width)
        half = HALVES[self.dtype]
        gate = (torch.randn(self.num_rows, self.width, generator=random) * 4).to(half)
        gate[0, :6] = torch.tensor([0.0, -0.0, -6e4, 6e4, -11.0, 1e-7])
        up = torch.randn(self.num_rows, self.width, generator=random).to(half)
        if self.merged:
            both = place(torch.cat([gate, up], dim=1))
            gate, up = both[:, : self.width], both[:, self.width :]
        else:
            gate, up = place(gate), place(up)
        out = place(torch.full((self.num_rows, self.width), float("nan"), dtype=half))
        params = GatedActivationParams(
            self.num_rows,
            self.width,
            gate.stride(0),
            DTYPES[self.dtype],
            ACTIVATIONS[self.activation],
            gate.data_ptr(),
            up.data_ptr(),
            out.data_ptr(),
        )
        assert library.gate.problem(params) is None
        assert library.gate.launch(params, stream) == 0
        want = gated_activation(as_float64(gate), as_float64(up), self.activation)
        # A float32 exponent of size 40 is off by 2^-19 of the result.
        limit = np.abs(want) * (HALF_ULP[self.dtype] * 1.01 + 8 * FLOAT32) + TINIEST[self.dtype] / 2 + 1e-37
        largest = torch.finfo(half).max
        error = np.abs(np.clip(as_float64(out), -largest, largest) - np.clip(want, -largest, largest))
        assert (error <= limit).all(), float((error / limit).max())


GATE_CASES = [
    GateCase(1, 8),
    GateCase(3, 64, "gelu"),
    GateCase(2, 1032, "gelu_tanh"),  # a second block of a row with one thread at work
    GateCase(2, 1032, "silu", merged=False),
    GateCase(2, 136, "silu", "bfloat16"),
    GateCase(5, 40, "gelu", "bfloat16", merged=False),
    GateCase(2, 136, "gelu_tanh", "bfloat16"),
]


def rounded(values: np.ndarray, half: torch.dtype) -> np.ndarray:
    """float64, rounded once to what `half` holds."""
    return as_float64(torch.from_numpy(values).to(half))


def as_float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()
