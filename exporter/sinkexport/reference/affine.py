"""Affine-scaled attention (arXiv:2602.23057) on top of a model's own attention, for what bundles are compared with.

Weights a w + b / n over values give a times the attention's output and b times the mean of the n values that are seen:
here the output is changed, in the graphs the weights are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from sinkexport.families.interface import attention_inputs
from sinkexport.variants.affine import AffineFile


class AffineReference:
    """Affine attention of one model, whose inputs it sees inside `watching`. file: None changes nothing."""

    def __init__(self, file: AffineFile | None) -> None:
        self._file = file
        self._inputs: dict[torch.nn.Module, torch.Tensor] = {}

    @contextlib.contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """See what attention modules are given for the length of a context."""
        if self._file is None:
            yield
            return
        with attention_inputs(model) as self._inputs:
            yield

    def changed(
        self,
        module: Any,
        out: torch.Tensor,
        values: torch.Tensor,
        seen: torch.Tensor,
        q_heads: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Scale and shift out [B, T, Hq, D], a layer's attention over values [B, Hkv, n, D].

        seen: bool [T, n], which values each query sees. q_heads: which heads of the layer these are; None: all.
        """
        tensors = None if self._file is None else self._file.layers.get(int(module.layer_idx))
        if tensors is None:
            return out
        x = self._inputs[module].double()  # [B, T, N]
        heads = list(range(out.shape[2]) if q_heads is None else q_heads)

        def linear(weight: Any, bias: Any, absent: float) -> torch.Tensor:
            """[B, T, Hq] or [Hq]."""
            constant = np.full(len(heads), absent) if bias is None else bias[heads]
            projected = (
                0.0 if weight is None else torch.nn.functional.linear(x, torch.from_numpy(weight[heads]).double())
            )
            return projected + torch.from_numpy(constant).double()

        a = torch.ones(len(heads), dtype=torch.float64)
        if tensors.has_scale:
            a = linear(tensors.scale_weight, tensors.scale_bias, tensors.absent_scale_bias)
            a = {"linear": a, "sigmoid": a.sigmoid(), "clip": a.clamp(0, 1)}[tensors.activation]
        b = linear(tensors.bias_weight, tensors.bias_bias, 0.0)
        if tensors.scale_average is not None:
            b = torch.from_numpy(tensors.scale_average[heads]).double() - a
        share = (seen.double() / seen.sum(dim=1, keepdim=True)).to(values.dtype)  # [T, n]
        mean = (share @ values).repeat_interleave(len(heads) // values.shape[1], dim=1)  # [B, Hq, T, D]
        return a[..., None].to(out.dtype) * out + b[..., None].to(out.dtype) * mean.transpose(1, 2)
