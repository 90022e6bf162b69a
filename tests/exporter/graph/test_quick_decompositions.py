"""Traces that are not traced again to be decomposed: what the converter makes of them is what it would have made."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from sinkexport.graph.convert import TRACED_OPSET, convert
from sinkexport.graph.quick_decompositions import without_second_trace
from sinkexport.graph.translations import translations
from sinkexport.model.tracing import trace

from tests.exporter.graph.same_graph import described
from tests.exporter.graph.test_stamp_layers import step_of
from tests.exporter.tiny_models import tiny_model


def lines(model: ir.Model) -> list[str]:
    """Nodes with all names."""
    return [str(node) for node in model.graph]


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "mixtral"])
def test_same_graph(name: str, num_tokens: int) -> None:
    """Also where an operator has to be decomposed, names included."""
    step = step_of(tiny_model(name), num_tokens)
    quick, program = convert(trace(step)), trace(step)
    converted = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=TRACED_OPSET,
        optimize=False,
        verbose=False,
        custom_translation_table=translations(),
    )
    assert converted is not None
    assert (lines(quick), described(quick)) == (lines(converted.model), described(converted.model))


def test_traced_once() -> None:
    """Nothing is traced again in a family whose operators stay; but everything is where the table names one of them."""
    program = without_second_trace(trace(step_of(tiny_model("llama"))))
    assert program.run_decompositions({}) is program
    assert program.run_decompositions({torch.ops.aten.silu.default: lambda x: x * x.sigmoid()}) is not program


class Unusual(torch.nn.Module):
    """An operator that is not known to stay."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mish(x)


def test_unknown_operators_are_traced_again() -> None:
    program = without_second_trace(torch.export.export(Unusual(), (torch.ones(1, 2),)))
    assert program.run_decompositions({}) is not program
