"""Scale and bias of affine-scaled attention as a traced model computes them (arXiv:2602.23057)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from sinkexport.variants.affine import LayerAffine

Factors = tuple[torch.Tensor | None, torch.Tensor | None]
"""a and b, each [B, Hq, T], or [1, Hq, 1] if it is the same for all tokens; None: 1 and 0."""


class AffineFactors(torch.nn.Module):
    """One layer's ``forward(x) -> a, b``. x: [B, T, hidden], what the layer's projections read."""

    def __init__(self, tensors: LayerAffine, num_q_heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.activation = tensors.activation
        for name in ("scale_weight", "bias_weight"):
            self._keep(name, _transposed(getattr(tensors, name)), dtype)
        self.has_scale = tensors.has_scale
        self.has_average = tensors.scale_average is not None
        self.has_bias = self.has_average or bool(tensors.bias_bias is not None and tensors.bias_bias.any())
        self.has_bias |= self.bias_weight is not None
        for name, absent in (("scale_bias", tensors.absent_scale_bias), ("bias_bias", 0.0), ("scale_average", 0.0)):
            values = getattr(tensors, name)
            self._keep(name, np.full(num_q_heads, absent) if values is None else values, dtype)

    def _keep(self, name: str, values: npt.NDArray[np.floating] | None, dtype: torch.dtype) -> None:
        self.register_buffer(name, None if values is None else torch.from_numpy(values).to(dtype), persistent=False)

    def forward(self, x: torch.Tensor) -> Factors:
        scale = self._activated(self._projected(x, "scale")) if self.has_scale else None
        if not self.has_bias:
            return scale, None
        if not self.has_average:
            return scale, self._projected(x, "bias")
        average = self.get_buffer("scale_average")[None, :, None]
        return scale, average - (1.0 if scale is None else scale)

    def _projected(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """[B, Hq, T], or [1, Hq, 1] where there is no weight."""
        bias, weight = self.get_buffer(f"{name}_bias"), getattr(self, f"{name}_weight")
        return bias[None, :, None] if weight is None else (x @ weight + bias).transpose(1, 2)

    def _activated(self, scale: torch.Tensor) -> torch.Tensor:
        if self.activation == "sigmoid":
            return scale.sigmoid()
        return scale.clamp(0.0, 1.0) if self.activation == "clip" else scale


def _transposed(weight: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32] | None:
    """[Hq, N] -> [1, N, Hq]; None if it is nothing but zeros.

    Of three axes: what joins and quantises projections leaves it alone, so that a recipe's rounding never meets it.
    """
    return None if weight is None or not weight.any() else np.ascontiguousarray(weight.T[None])
