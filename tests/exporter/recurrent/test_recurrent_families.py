"""Short convolutions and state-space layers: steps against chunks, idle streams, INT8 weights."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from sinkexport.config import ExportConfig
from sinkexport.families.recurrent import recurrent_cache, steps_like_texts, with_cache
from sinkexport.quant.recipe import load_recipe
from sinkrt import Session
from sinkrt.contract import RECURRENT_KINDS
from sinkrt.errors import UsageError

from tests.exporter.pipeline.test_families import assert_close, exported
from tests.exporter.tiny_models import tiny_model
from tests.support import nightly_but, random_ids

CONVOLUTIONS = ("lfm2", "lfm2_moe", "lfm3")
MAMBA2 = ("nemotron_h", "granitemoehybrid", "bamba", "falcon_h1", "zamba2", "mamba2")
MAMBA1 = ("jamba", "zamba", "mamba", "falcon_mamba")
FAMILIES = (*CONVOLUTIONS, *MAMBA2, *MAMBA1)

NUM_TOKENS = 75
DAILY = (("lfm2", 64), ("lfm3", 4), ("nemotron_h", 16), ("granitemoehybrid", 1), ("jamba", 4), ("mamba", 1))


def recurrent_rows(session: Session, stream: int) -> list[np.ndarray]:
    """Copies of the recurrent states of a stream."""
    states = [state for state in session.manifest.states if state.kind in RECURRENT_KINDS]
    return [np.asarray(session.buffers[state.input])[stream].copy() for state in states]


@pytest.mark.parametrize(
    ("name", "chunk"), nightly_but(DAILY, [(name, chunk) for name in FAMILIES for chunk in (1, 4, 16, 64)])
)
def test_chunks_and_steps_of_three_streams_are_dense(name: str, chunk: int, tmp_path: Path) -> None:
    """Nothing is evicted; a chunk ends midway, and streams that have no token stand still to the bit."""
    wide = {"sliding_window": NUM_TOKENS} if name == "lfm3" and chunk > 4 else {}  # a chunk must fit every window
    model = tiny_model(name, **wide)
    ids, lengths = random_ids(3, NUM_TOKENS), np.array([70, 41, 13])
    with torch.no_grad():
        dense = model(torch.from_numpy(ids)).logits.numpy()
    session = exported(model, tmp_path / "bundle", ExportConfig(2, NUM_TOKENS, batch=3, chunk_size=chunk))
    logits = session.prefill(ids[:, : lengths.max()], lengths)
    for stream, length in enumerate(lengths):
        assert_close(logits[stream], dense[stream, length - 1], 1e-4, f"prefill of {stream}")
    for k in range(3):
        still = recurrent_rows(session, 1)
        assert still
        logits = session.step(ids[[0, 2], lengths[[0, 2]] + k], streams=[0, 2])
        for stream in (0, 2):
            assert_close(logits[stream], dense[stream, lengths[stream] + k], 1e-4, f"step {k} of {stream}")
        for before, after in zip(still, recurrent_rows(session, 1), strict=True):
            np.testing.assert_array_equal(before, after)
    logits = session.prefill(ids[1:2, 41:60], streams=[1])
    assert_close(logits[1], dense[1, 59], 1e-4, "prefill of a stream that stood still")


def test_single_tokens_keep_the_limits_of_time_steps_as_a_text_does() -> None:
    model, ids = tiny_model("mamba2", time_step_limit=(0.3, 0.9)), torch.from_numpy(random_ids(1, 9))
    errors = []
    with torch.no_grad():
        dense = model(ids).logits
        for context in (steps_like_texts(model), contextlib.nullcontext()):  # transformers' own steps do not
            cache = recurrent_cache(model)
            with context:
                steps = [model(token[:, None], **with_cache(model, cache)).logits for token in ids.T]
            errors.append(float((torch.cat(steps, dim=1) - dense).abs().max()))
    assert errors[0] < 1e-4
    assert errors[1] > 1e-2


def test_the_plugin_target_refuses_a_model_without_attention(tmp_path: Path) -> None:
    config = ExportConfig(2, 16, chunk_size=4, dtype="fp16", target="tensorrt")
    with pytest.raises(UsageError, match=r"no attention, and target tensorrt with the plugin.*--native"):
        exported(tiny_model("mamba", dtype=torch.float16), tmp_path / "bundle", config)
    assert not list(tmp_path.iterdir())


def error_of_noise(model: Any, ids: np.ndarray, dense: np.ndarray) -> float:
    """Error of logits where each weight of a matmul is off by up to half a step of 8 bits: some models magnify it."""
    random = torch.Generator().manual_seed(1)
    noisy = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in noisy.parameters():
            if parameter.dim() > 1:
                step = parameter.abs().amax(dim=-1, keepdim=True) / 127
                parameter += (torch.rand(parameter.shape, generator=random) - 0.5) * step
        logits = noisy(torch.from_numpy(ids)).logits.numpy()
    return float(np.linalg.norm(logits - dense) / np.linalg.norm(dense))


@pytest.mark.parametrize("name", nightly_but(("lfm2", "mamba2", "zamba2", "jamba"), FAMILIES))
def test_int8_weights_leave_states_and_convolutions_alone(name: str, tmp_path: Path) -> None:
    model, recipe = tiny_model(name), load_recipe("int8-weights")
    ids = random_ids(1, 16)
    with torch.no_grad():
        dense = model(torch.from_numpy(ids)).logits.numpy()
    session = exported(model, tmp_path / "bundle", ExportConfig(2, 16, chunk_size=4, recipe=recipe))
    states = {state.dtype for state in session.manifest.states if state.kind in RECURRENT_KINDS}
    assert states == {"float32"}
    graph = onnx.load(tmp_path / "bundle" / "decode.onnx", load_external_data=False).graph
    convolved = {node.input[1] for node in graph.node if node.op_type == "Conv"}
    sizes = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert convolved
    assert {sizes[weight] for weight in convolved} == {onnx.TensorProto.FLOAT}
    packed = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.UINT8}
    for part in ("in_proj", "out_proj"):
        assert any(part in weight for weight in packed), part
    steps = np.stack([session.step(ids[:, t]).copy() for t in range(ids.shape[1])], axis=1)
    error = np.linalg.norm(steps - dense) / np.linalg.norm(dense)
    assert 1e-5 < error < max(0.05, 4 * error_of_noise(model, ids, dense))
