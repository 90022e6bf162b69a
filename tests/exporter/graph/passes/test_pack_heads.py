"""pack_heads: attention of a step reads q, k, v as one matmul leaves them. Whole bundles: test_packed_heads.py."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from sinkexport.graph.builder import Builder
from sinkexport.graph.passes.pack_heads import PackHeads
from sinkexport.graph.passes.use_attention_plugin import UseAttentionPlugin

from tests.exporter.graph.passes.attention_graphs import (
    BATCH,
    DIM,
    HEADS,
    KV_HEADS,
    attention_graph,
    attention_of,
    value,
)
from tests.exporter.graph.passes.pass_checks import check_left_alone, kinds, parsed

HALF = ir.DataType.FLOAT16


def step(num_tokens: int = 1, *, between: str = "Reshape", order: str = "qkv") -> ir.Model:
    """Split -> views -> SinkAttention -> Reshape. between: an operator beside the views of keys."""
    model = attention_graph(num_tokens, dtype=HALF)
    UseAttentionPlugin()(model)
    graph, node = model.graph, attention_of(model)
    widths = {name: n * DIM for name, n in zip("qkv", (HEADS, KV_HEADS, KV_HEADS), strict=True)}
    whole = value("whole", (BATCH, num_tokens, sum(widths.values())), HALF)
    graph.inputs.append(whole)
    b = Builder(graph)
    parts = dict(zip(order, b.split(whole, [widths[name] for name in order], -1), strict=True))
    for i, name in enumerate("qkv"):
        rows = b.op("Neg", [parts[name]]) if between == "Neg" and name == "k" else parts[name]
        heads = widths[name] // DIM
        if num_tokens == 1:
            node.replace_input_with(i, b.reshape(rows, (BATCH, heads, 1, DIM)))
        else:
            turned = b.reshape(rows, (BATCH, num_tokens, heads, DIM))
            shape = (BATCH, heads, num_tokens, DIM)
            node.replace_input_with(i, b.op("Transpose", [turned], shape, perm=[0, 2, 1, 3]))
    graph.insert_before(node, b.nodes)
    b = Builder(graph)
    out = graph.outputs[0]
    joined = b.reshape(out, (BATCH, num_tokens, HEADS * DIM))
    y = b.op("Neg", [joined])
    y.name = "y"
    graph.outputs[0] = y
    graph.insert_after(node, b.nodes)
    return model


def test_a_step_is_packed() -> None:
    model = step()
    assert PackHeads()(model).modified
    assert kinds(model) == ["Neg", "SinkAttention"]
    node = attention_of(model)
    assert [given.name for given in node.inputs[:2]] == ["whole", "position"]
    assert node.attributes["packed_width"].as_int() == HEADS * DIM
    assert tuple(node.outputs[0].shape) == (BATCH, 1, HEADS * DIM)
    check_left_alone(model, PackHeads())


@pytest.mark.parametrize(
    "model", [step(3), step(between="Neg"), step(order="kqv")], ids=["a chunk", "an operator between", "another order"]
)
def test_left_alone(model: ir.Model) -> None:
    check_left_alone(model, PackHeads())


def test_other_graphs_are_left_alone() -> None:
    check_left_alone(attention_graph(dtype=HALF), PackHeads())  # not in the plugin's form
    check_left_alone(parsed("y = Exp (x)", "float[2] x", "float[2] y"), PackHeads())
