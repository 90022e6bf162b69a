"""use_attention_plugin: SinkAttention in the plugin's form. What such graphs compute: test_plugin_target.py."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from sinkexport.graph.passes.use_attention_plugin import UseAttentionPlugin

from tests.exporter.graph.passes.attention_graphs import DIM, FREQUENCY, SINKS, attention_graph, attention_of
from tests.exporter.graph.passes.pass_checks import check_left_alone, kinds, parsed

HALF = ir.DataType.FLOAT16


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_rotations_become_the_nodes_own(num_tokens: int) -> None:
    model = attention_graph(num_tokens, dtype=HALF)
    assert UseAttentionPlugin()(model).modified
    assert kinds(model) == ["SinkAttention"]
    node = attention_of(model)
    names = ["q", "k", "v", "position", "window_k", "window_v", "sink_k", "sink_v"]
    assert [value.name for value in node.inputs[:8]] == names
    frequency, *num_valid = node.inputs[8:]
    np.testing.assert_array_equal(frequency.const_value.numpy().view(np.uint32), FREQUENCY)
    assert [value.name for value in num_valid] == ["num_valid"] * (num_tokens > 1)
    found = {name: attribute.value for name, attribute in node.attributes.items()}
    assert found["rotary_dim"] == DIM
    assert found["num_sinks"] == SINKS
    assert found["has_num_valid"] == int(num_tokens > 1)
    assert found["plugin_version"] == "1"
    out, sink_k, sink_v, window_k, window_v = model.graph.outputs
    assert list(node.outputs) == [out, window_k, window_v, sink_k, sink_v]
    check_left_alone(model, UseAttentionPlugin())


def test_states_become_float16() -> None:
    model = attention_graph()
    UseAttentionPlugin()(model)
    assert {value.dtype for value in model.graph.inputs if "_" in value.name} == {HALF}
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT  # cast back
    assert kinds(model) == ["Cast", "Cast", "Cast", "Cast", "SinkAttention"]
    check_left_alone(model, UseAttentionPlugin())


@pytest.mark.parametrize("changes", [{"rotated": ("q",)}, {"rotated": ()}, {"with_angles": False}], ids=str)
def test_rotations_that_the_plugin_has_not_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match="rotated in a way that attention cannot do itself"):
        UseAttentionPlugin()(attention_graph(**changes))


def test_left_alone() -> None:
    check_left_alone(parsed("u = Exp (x) y = Neg (x)", "float[2] x", "float[2] y"), UseAttentionPlugin())
