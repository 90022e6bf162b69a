"""expand_attention: attention in standard operators. What each form computes over whole streams: test_operator.py."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes import common
from sinkexport.graph.graph_pass import PassContext
from sinkexport.graph.passes.expand_attention import ExpandAttention
from sinkexport.targets import ONNX, TENSORRT_NATIVE, Target

from tests.exporter.graph.passes.attention_graphs import SINKS, WINDOW, attention_graph
from tests.exporter.graph.passes.expert_graphs import E, K, M, expert_graph
from tests.exporter.graph.passes.pass_checks import check_left_alone, kinds, parsed


@pytest.mark.parametrize("target", [ONNX, TENSORRT_NATIVE], ids=lambda target: target.name)
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_the_first_tokens(num_tokens: int, target: Target) -> None:
    """Each sees itself and those before it: plain causal attention, as long as nothing is evicted."""
    model = attention_graph(num_tokens, rotated=())
    under_test = ExpandAttention(PassContext(target))
    assert under_test(model).modified
    check_left_alone(model, under_test)
    assert all(not node.domain for node in model.graph)
    assert "ai.sinkexport" not in model.opset_imports
    circular = num_tokens > 1 and not target.has_circular_scatter
    assert ("TensorScatter" in kinds(model)) != circular
    common.NameFixPass()(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    given = {i.name: np.zeros(i.shape, np.int64 if "int64" in i.type else np.float32) for i in session.get_inputs()}
    for name in "qkv":
        given[name] = random.standard_normal(given[name].shape).astype(np.float32)
    if num_tokens > 1:
        given["num_valid"] = np.full_like(given["num_valid"], num_tokens)
    out, *_ = session.run(None, given)
    assert num_tokens <= SINKS + WINDOW
    for t in range(num_tokens):
        for head in range(out.shape[1]):
            kv = head // 2
            logits = 0.125 * given["k"][0, kv, : t + 1] @ given["q"][0, head, t]
            weights = np.exp(logits - logits.max())
            want = (weights / weights.sum()) @ given["v"][0, kv, : t + 1]
            np.testing.assert_allclose(out[0, head, t], want, atol=1e-5)


def test_other_operators_of_the_domain_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown operator ai\.sinkexport::ExpertMatmul"):
        ExpandAttention()(expert_graph(np.ones((E, K, M), np.float32), (3, K), 3, is_transposed=True))


def test_left_alone() -> None:
    model = parsed("y = Exp (x)", "float[2] x", "float[2] y")
    model.opset_imports.pop("ai.sinkexport")
    check_left_alone(model, ExpandAttention())
