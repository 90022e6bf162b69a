"""use_cpu_attention: SinkAttention in the CPU library's form. What such graphs compute: test_cpu_target.py."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from sinkexport.graph.passes.use_cpu_attention import UseCpuAttention

from tests.exporter.graph.passes.attention_graphs import DIM, FREQUENCY, SINKS, attention_graph, attention_of
from tests.exporter.graph.passes.pass_checks import check_left_alone, kinds, parsed


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_rotations_become_the_nodes_own(num_tokens: int) -> None:
    model = attention_graph(num_tokens)
    assert UseCpuAttention()(model).modified
    assert kinds(model) == ["SinkAttention"]
    node = attention_of(model)
    names = ["q", "k", "v", "position", "window_k", "window_v", "sink_k", "sink_v"]
    assert [value.name for value in node.inputs[:8]] == names
    np.testing.assert_array_equal(node.inputs[8].const_value.numpy(), FREQUENCY)
    assert [value.name for value in node.inputs[9:]] == ["num_valid"] * (num_tokens > 1)
    found = {name: attribute.value for name, attribute in node.attributes.items()}
    assert (found["rotary_dim"], found["num_sinks"], found["has_num_valid"]) == (DIM, SINKS, int(num_tokens > 1))
    assert (found["packed_width"], found["bfloat16_chunks"]) == (0, 0)
    assert {value.dtype for value in model.graph.inputs if "_" in value.name and value.name != "num_valid"} == {
        ir.DataType.FLOAT
    }
    out, sink_k, sink_v, window_k, window_v = model.graph.outputs
    assert list(node.outputs) == [out, window_k, window_v, sink_k, sink_v]
    check_left_alone(model, UseCpuAttention())


@pytest.mark.parametrize(
    "changes", [{"rotated": ("q",)}, {"rotated": ()}, {"with_angles": False}, {"dtype": ir.DataType.FLOAT16}], ids=str
)
def test_what_the_kernel_does_not_do_stays_traced(changes: dict) -> None:
    check_left_alone(attention_graph(**changes), UseCpuAttention())


def test_left_alone() -> None:
    check_left_alone(parsed("u = Exp (x) y = Neg (x)", "float[2] x", "float[2] y"), UseCpuAttention())
