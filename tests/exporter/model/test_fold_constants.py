"""Numbers that a model's code computes of constants, by an operator that ONNX lacks."""

from __future__ import annotations

import torch
from sinkexport.model.fold_constants import fold_constants
from sinkexport.model.fold_rotation import functional


class _Quantile(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.distributions.Normal(0, 1).icdf(torch.tensor(0.95))


class _OfTheInput(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.erfinv(x)


def _folded(module: torch.nn.Module) -> torch.export.ExportedProgram:
    program = functional(torch.export.export(module, (torch.tensor([0.5]),), strict=False))
    fold_constants(program)
    return program


def _has_erfinv(program: torch.export.ExportedProgram) -> bool:
    return any(node.target is torch.ops.aten.erfinv.default for node in program.graph.nodes)


def test_of_a_constant() -> None:
    program = _folded(_Quantile())
    assert not _has_erfinv(program)
    x = torch.tensor([0.25])
    assert torch.equal(program.module()(x), _Quantile()(x))


def test_of_an_input_is_left() -> None:
    assert _has_erfinv(_folded(_OfTheInput()))
