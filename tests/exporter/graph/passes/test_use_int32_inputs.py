"""use_int32_inputs: ids, positions and num_valid for runtimes without int64 inputs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from sinkexport.graph.passes.use_attention_plugin import UseAttentionPlugin
from sinkexport.graph.passes.use_int32_inputs import UseInt32Inputs

from tests.exporter.graph.passes.attention_graphs import attention_graph, attention_of
from tests.exporter.graph.passes.pass_checks import check_left_alone, numbers, parsed, written

INT32 = ir.DataType.INT32


class SinkAttention(OpRun):
    """Gives back the queries and the states: what is tested is around it."""

    op_domain = "ai.sinkexport"

    def _run(self, q, k, v, position, *others, **attributes):
        return (q, *others[:4])


def is_a_sink() -> ir.Model:
    """What quantisation with sinks of their own asks, and an embedding that goes through a clipped id."""
    return parsed(
        "e = Gather (table, ids) c = Max (ids, zero) f = Gather (table, c) s = Less (position, four) "
        "i = Cast <to = 1> (s) y = Add (e, f) z = Mul (i, i)",
        "int64[1, 2] ids, int64[1] position",
        "float[1, 2, 3] y, float[1] z",
        f"{written('table', numbers(5, 3))}, int64[1] zero = {{0}}, int64[1] four = {{4}}",
    )


@pytest.mark.parametrize("t", [0, 3, 4, 65535, 65536, 2**31 + 3, 2**47 - 1])
def test_positions_are_two_words(t: int) -> None:
    ids, position = np.array([[4, 1]]), np.array([t])
    want = ReferenceEvaluator(ir.to_proto(is_a_sink())).run(None, {"ids": ids, "position": position})
    model = is_a_sink()
    assert UseInt32Inputs()(model).modified
    assert [value.dtype for value in model.graph.inputs] == [INT32, INT32]
    words = np.array([[t >> 16, t & 0xFFFF]]).astype(np.int32)
    got = ReferenceEvaluator(ir.to_proto(model)).run(None, {"ids": ids.astype(np.int32), "position": words})
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    check_left_alone(model, UseInt32Inputs())


def test_attention_gets_the_words_and_num_valid() -> None:
    model = attention_graph(3, dtype=ir.DataType.FLOAT16)
    UseAttentionPlugin()(model)
    assert UseInt32Inputs()(model).modified
    position, num_valid = attention_of(model).inputs[3], attention_of(model).inputs[9]
    assert (position.name, tuple(position.shape), position.dtype) == ("position", (1, 2), INT32)
    assert (num_valid.name, num_valid.dtype) == ("num_valid", INT32)
    check_left_alone(model, UseInt32Inputs())


@pytest.mark.parametrize("num_valid", [1, 2, 3])
def test_the_last_valid_token_is_selected(num_valid: int) -> None:
    model = chunk_with_selection()
    UseAttentionPlugin()(model)
    UseInt32Inputs()(model)
    q = np.random.default_rng(0).standard_normal((1, 4, 3, 64)).astype(np.float16)
    given = {str(value.name): np.zeros(value.shape.numpy(), value.dtype.numpy()) for value in model.graph.inputs} | {
        "q": q,
        "num_valid": np.array([num_valid], np.int32),
    }
    (last, *_) = ReferenceEvaluator(ir.to_proto(model), new_ops=[SinkAttention]).run(None, given)
    np.testing.assert_array_equal(last, q[:, 0, num_valid - 1 : num_valid])


def test_what_routers_select_is_left_alone() -> None:
    """A choice of the data itself, which attention's tokens that count come into as well."""
    model = attention_graph(3, dtype=ir.DataType.FLOAT16)
    UseAttentionPlugin()(model)
    router = parsed(
        "v, i = TopK (s, one) y = GatherElements <axis = -1> (s, i)",
        "float16[1, 4, 3, 64] s",
        "float16[1, 4, 3, 1] y",
        "int64[1] one = {1}",
    ).graph
    nodes, (scores,), (y,) = list(router), router.inputs, router.outputs
    one = router.initializers.pop("one")
    for node in nodes:
        for i, given in enumerate(node.inputs):
            node.replace_input_with(i, model.graph.outputs[0] if given is scores else given)
    router.remove(nodes)
    router.outputs.clear()
    model.graph.register_initializer(one)
    model.graph.extend(nodes)
    model.graph.outputs[0] = y
    UseInt32Inputs()(model)
    assert "GatherElements" in [node.op_type for node in model.graph]


def chunk_with_selection() -> ir.Model:
    """GatherElements of token num_valid - 1, as the traced prefill graph has it."""
    model = attention_graph(3, dtype=ir.DataType.FLOAT16)
    graph = model.graph
    num_valid = next(value for value in graph.inputs if value.name == "num_valid")
    selection = parsed(
        "n = Sub (num_valid, one) c = Clip (n, zero) r = Reshape (c, cube) i = Expand (r, row) "
        "h = Gather <axis = 1> (out, head) y = GatherElements <axis = 1> (h, i)",
        "float16[1, 4, 3, 64] out, int64[1] num_valid",
        "float16[1, 1, 64] y",
        "int64[1] one = {1}, int64 zero = {0}, int64[3] cube = {1, 1, 1}, int64[3] row = {1, 1, 64}, int64 head = {0}",
    ).graph
    nodes, constants = list(selection), list(selection.initializers.values())
    (out, other), (y,) = selection.inputs, selection.outputs
    for node in nodes:
        for i, given in enumerate(node.inputs):
            node.replace_input_with(i, {out: graph.outputs[0], other: num_valid}.get(given, given))
    selection.remove(nodes)
    for constant in constants:
        selection.initializers.pop(constant.name)
        graph.register_initializer(constant)
    selection.outputs.clear()
    graph.extend(nodes)
    graph.outputs[0] = y
    return model


def test_left_alone() -> None:
    check_left_alone(parsed("y = Exp (x)", "float[2] x", "float[2] y"), UseInt32Inputs())
