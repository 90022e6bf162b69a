"""Attention that verifies drafts against the float64 oracle: what is committed is what plain feeding gives."""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes import common
from sinkexport.graph.graph_pass import PassContext, run_passes
from sinkexport.targets import ONNX
from sinkrt.contract import StateSpec
from sinkrt.state_rows import StateRows

from tests.exporter.graph.test_operator import (
    ATOL,
    CASES,
    CHUNKS,
    SCALED,
    SCALED_CHUNKS,
    Subject,
    _converted,
    _random_affine,
    _random_tokens,
    _subject,
)

KINDS = ("sink_k", "sink_v", "window_k", "window_v")


@functools.cache
def verifier(subject: Subject, num_tokens: int, affine: tuple = (None, None)) -> ort.InferenceSession:
    model = ir.from_proto(_converted(subject, num_tokens, affine))
    run_passes(model, ("expand_attention",), PassContext(ONNX, verifies=True))
    out, *states = model.graph.outputs
    model.graph.outputs[:] = [out, *states[-2:]]  # sinks have the same rows
    common.NameFixPass()(model)
    assert not any(node.op_type == "TensorScatter" for node in model.graph)
    model.ir_version = ONNX.ir_version
    return ort.InferenceSession(ir.to_proto(model).SerializeToString())


@pytest.mark.parametrize(
    ("case", "num_tokens", "sink_scale", "parts"),
    [
        *((case, num_tokens, None, None) for case, num_tokens in CHUNKS),
        *((case, min(case[6], 4), factors, None) for case, factors in SCALED if case[6] > 1),
        *((*scaled[:3], None) for scaled in SCALED_CHUNKS),
        (CASES[1], 5, None, "scale, bias"),
        (CASES[8], 5, None, "scale, bias"),
        ((4, 2, 1, 8, 8, 13, 5, 0.0, True), 4, None, "bias"),
    ],
    ids=str,
)
def test_drafts_against_the_oracle(case: tuple, num_tokens: int, sink_scale: tuple | None, parts: str | None) -> None:
    """Each stream has 0 .. T tokens verified and some of them committed, past six wraps; positions drift apart."""
    (batch, num_q, *_), (num_sinks, window) = case, case[5:7]
    oracle, _, states = _subject(case, sink_scale)
    arrays = [state.numpy() for state in states]
    names = [f"{kind}.0" for kind in KINDS[-len(states) :]]
    specs = [
        StateSpec(0, kind, f"{kind}.0", f"{kind}.0.next", array.shape, "float32")
        for kind, array in zip(KINDS[-len(states) :], arrays, strict=True)
    ]
    random = np.random.default_rng(5)
    position = np.zeros(batch, dtype=np.int64)
    while position.min() < 6 * window + num_sinks + 7:
        counts = random.integers(0, num_tokens + 1, batch)
        taken = np.array([random.integers(0, count + 1) for count in counts])
        q, k, v = _random_tokens(random, case, num_tokens)
        pairs, tensors = np.zeros((batch, num_q, num_tokens, 2)), [None, None]
        pairs[..., 0] = 1.0
        if parts is not None:
            pairs, tensors = _random_affine(random, parts, batch, num_q, num_tokens)
        given = [q, k, v, position, *arrays, counts, *(x.numpy() for x in tensors if x is not None)]
        session = verifier((case, sink_scale, None), num_tokens, tuple(None if x is None else x.shape for x in tensors))
        inputs = [value.name for value in session.get_inputs()]
        before = [array.copy() for array in arrays]
        out, *rows = session.run(None, dict(zip(inputs, given, strict=True)))
        assert all(np.array_equal(*pair) for pair in zip(before, arrays, strict=True))
        for b in range(batch):
            known = len(oracle.streams[b])
            for i in range(counts[b]):
                want = oracle.step_stream(b, q[b, :, i], k[b, :, i], v[b, :, i], affine=pairs[b, :, i])
                at = f"stream {b}, t = {position[b]} + {i}"
                np.testing.assert_allclose(out[b, :, i], want, atol=ATOL if parts is None else 5e-5, err_msg=at)
            del oracle.streams[b][known + taken[b] :]
        by_name = dict(zip(names, (rows * 2)[-len(names) :], strict=True))
        writer = StateRows(specs, dict(zip(names, arrays, strict=True)), by_name)
        for b in range(batch):
            writer.write(b, int(position[b]), 0, int(taken[b]))
        position += taken


def test_attention_that_every_token_changes_is_refused() -> None:
    from tests.exporter.graph.test_operator import CALIBRATED_CHUNKS

    case, num_tokens, factors, act = CALIBRATED_CHUNKS[0]
    model = ir.from_proto(_converted((case, factors, act), num_tokens, (None, None)))
    with pytest.raises(ValueError, match="attention_mass"):
        run_passes(model, ("expand_attention",), PassContext(ONNX, verifies=True))


def test_rows_of_layers_are_written_at_once_where_they_lie_at_equal_distances() -> None:
    """And one by one elsewhere, with the same result."""
    random = np.random.default_rng(0)
    specs = [
        StateSpec(layer, kind, f"{kind}.{layer}", f"{kind}.{layer}.next", (2, 3, length, 4), "float32")
        for layer in range(3)
        for kind, length in (("sink_k", 2), ("window_k", 5))
    ]
    memory = random.random((len(specs), 2, 3, 5, 4)).astype(np.float32)
    tokens = {f"{kind}.{layer}": random.random((2, 3, 4, 4), np.float32) for layer in range(3) for kind in KINDS[::2]}
    together = {spec.input: memory[i, :, :, : spec.shape[2]] for i, spec in enumerate(specs)}
    apart = {name: array.copy() for name, array in together.items()}
    for states in (together, apart):
        rows = StateRows(specs, states, tokens)
        rows.write(1, 1, 0, 4)  # token 1 is a sink, 2 .. 4 are not
        rows.write(0, 2 + 5 * 10**12 + 3, 1, 3)  # the slots 3, 4 and 0
    for name, array in together.items():
        np.testing.assert_array_equal(array, apart[name])
    np.testing.assert_array_equal(apart["sink_k.2"][1, :, 1], tokens["sink_k.2"][1, :, 0])
    np.testing.assert_array_equal(apart["window_k.2"][1, :, :3], tokens["window_k.2"][1, :, 1:4])
    np.testing.assert_array_equal(apart["window_k.0"][0, :, [3, 4, 0]], tokens["window_k.0"][0, :, 1:4].swapaxes(0, 1))
