"""use_gate_plugin, on one pattern each: what it takes, leaves, and computes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from sinkexport.graph.passes.use_gate_plugin import UseGatePlugin

from tests.exporter.graph.passes.pass_checks import check_left_alone, evaluated, kinds, parsed, random_inputs

WIDTH = 16


def run_both(model: ir.Model, scale: float) -> tuple[list[str], list[np.ndarray], list[np.ndarray]]:
    """The nodes afterwards, and what comes out before and after."""
    inputs = random_inputs(model, scale)
    before = evaluated(model, inputs)
    assert UseGatePlugin()(model).modified
    found, after = kinds(model), evaluated(model, inputs)
    check_left_alone(model, UseGatePlugin())
    return found, before, after


SILU = "share = Sigmoid (gate)\nactive = Mul (gate, share)\n"
GELU = "active = Gelu (gate)\n"
GELU_TANH = 'active = Gelu <approximate = "tanh"> (gate)\n'
MERGED = "gate, up = Split <axis = -1> (both, sizes)\n"


def gate_graph(
    body: str, *, merged: bool = True, width: int = WIDTH, dtype: str = "float16", outputs: str = "", factor: str = "up"
) -> ir.Model:
    shape = f"{dtype}[2, 3, {width}]"
    inputs = f"{dtype}[2, 3, {2 * width}] both" if merged else f"{shape} gate, {shape} up"
    return parsed(
        (MERGED if merged else "") + body + f"y = Mul (active, {factor})\n",
        inputs,
        f"{shape} y" + (f", {shape} {outputs}" if outputs else ""),
        f"int64[2] sizes = {{{width}, {width}}}",
    )


@pytest.mark.parametrize(
    ("model", "activation", "merged", "expected"),
    [
        (gate_graph(SILU), 0, 1, ["GatedActivation"]),
        (gate_graph(GELU), 1, 1, ["GatedActivation"]),
        (gate_graph(GELU_TANH), 2, 1, ["GatedActivation"]),
        (gate_graph(SILU, merged=False), 0, 0, ["GatedActivation"]),
        (gate_graph(GELU, merged=False), 1, 0, ["GatedActivation"]),
        (gate_graph(SILU, outputs="gate"), 0, 1, ["GatedActivation", "Split"]),  # something else reads a half
        (gate_graph(SILU.replace("gate", "up"), factor="gate"), 0, 0, ["GatedActivation", "Split"]),  # up | gate
    ],
    ids=range(7),
)
def test_gates_that_become_nodes(model: ir.Model, activation: int, merged: int, expected: list[str]) -> None:
    """They differ from what was there by its roundings: of the share, of the activation."""
    found, before, after = run_both(model, 2.0)
    assert found == expected
    (node,) = (node for node in model.graph if node.op_type == "GatedActivation")
    assert [node.attributes[name].as_int() for name in ("activation", "is_merged", "width")] == [
        activation,
        merged,
        WIDTH,
    ]
    np.testing.assert_allclose(after[0].astype(np.float64), before[0].astype(np.float64), rtol=4 * 2.0**-11, atol=2e-3)
    for got, want in zip(after[1:], before[1:], strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "model",
    [
        gate_graph(SILU, width=12),
        gate_graph(SILU, dtype="float"),
        gate_graph(SILU, outputs="share"),
        gate_graph(SILU, outputs="active"),
        gate_graph("share = Sigmoid (gate)\nactive = Mul (up, share)\n"),
        gate_graph("active = Relu (gate)\n"),
    ],
    ids=["width", "float32", "share is read", "activation is read", "another factor", "another activation"],
)
def test_gates_that_stay(model: ir.Model) -> None:
    check_left_alone(model, UseGatePlugin())
