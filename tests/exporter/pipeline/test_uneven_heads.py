"""Heads that differ from layer to layer, fewer key than value heads, caches that layers share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sinkexport.reference.chunked import chunked_streaming
from sinkrt import Session

from tests.exporter.pipeline.test_families import assert_close, assert_streams_like_reference
from tests.exporter.tiny_models import COMMON, VOCAB_SIZE, random_model, tiny_model
from tests.support import SharedExports, export_model, nightly_but, random_ids

S, W, T = 2, 9, 4


def shared_model(num_shared: int) -> Any:
    """Gemma 4 whose last layers read the caches of earlier ones: sliding and full ones by turns, of two head sizes."""
    kinds = ["sliding_attention", "full_attention"]
    sizes = {"head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 8, "sliding_window": 5}
    layers = {"num_hidden_layers": 6, "layer_types": kinds * 3, "num_kv_shared_layers": num_shared}
    sizes |= {"vocab_size_per_layer_input": VOCAB_SIZE}
    return random_model(transformers.Gemma4TextConfig(**{**COMMON, **sizes, **layers}))


GEOMETRY = {"num_sink_tokens": S, "window_size": W, "chunk_size": T}


def test_shared_caches_are_kept_once(shared_export: SharedExports) -> None:
    bundle = shared_export(functools.partial(shared_model, 4), **GEOMETRY, batch=3)
    states = [state.input for state in bundle.manifest.states]
    assert states == ["window_k.0", "window_v.0", "sink_k.1", "sink_v.1", "window_k.1", "window_v.1"]
    sizes = [(cache.layer, cache.key_dim) for cache in bundle.manifest.caches]
    assert sizes == [(0, 8), (1, 16)]


@pytest.mark.parametrize("num_shared", nightly_but([4], [0, 2, 4]))
def test_shared_caches_stream_exactly(num_shared: int, shared_export: SharedExports) -> None:
    bundle = shared_export(functools.partial(shared_model, num_shared), **GEOMETRY, batch=3)
    with bundle.session() as session:
        assert_streams_like_reference(session, bundle.model, random_ids(3, S + 7 * W), 1e-4)


MODELS: dict[str, Callable[[], Any]] = {
    "a shared cache": lambda: shared_model(4),
    "values smaller than keys": lambda: tiny_model("mimo_v2_flash"),
    "the same keys for several experts": lambda: tiny_model("jetmoe"),
}


@pytest.mark.parametrize("name", MODELS)
def test_an_int8_window(name: str, tmp_path: Path) -> None:
    """Every token sees the rounded rows, in steps and in chunks; so do readers of a cache that another call wrote."""
    model = MODELS[name]()
    ids = random_ids(1, S + 4 * W)
    export_model(model, tmp_path / "b", **GEOMETRY, kv="int8")
    with chunked_streaming(model, S, W, kv="int8") as stream:
        wanted = stream.feed(torch.from_numpy(ids)).numpy()
    with Session.load(tmp_path / "b", threads=1) as session:
        for t in range(ids.shape[1]):
            assert_close(session.step(ids[:, t]), wanted[:, t], 2e-3, f"step {t}")
        session.reset()
        assert_close(session.prefill(ids), wanted[:, -1], 2e-3, "prefill")


def test_keys_that_all_experts_share_are_kept_once(tmp_path: Path) -> None:
    """JetMoE hands its attention a copy of the same three key heads for each of two experts."""
    bundle = export_model(tiny_model("jetmoe"), tmp_path / "b", num_sink_tokens=S, window_size=W, chunk_size=T)
    assert (bundle.manifest.model.num_q_heads, bundle.manifest.model.num_kv_heads) == (6, 3)
    assert {state.shape[1] for state in bundle.manifest.states} == {3}


class FewerValues(torch.nn.Module):
    """A projection of values of the first of two heads alone, which all queries share (DHA, arXiv:2406.06567)."""

    def __init__(self, projection: torch.nn.Linear) -> None:
        super().__init__()
        half = projection.out_features // 2
        self.narrow = torch.nn.Linear(projection.in_features, half, bias=False)
        self.narrow.weight = torch.nn.Parameter(projection.weight[:half].detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(x)


def test_fewer_value_than_key_heads(tmp_path: Path) -> None:
    """It equals the model whose second value head has the first one's weights."""
    model, plain = tiny_model("llama"), tiny_model("llama")
    for layer, other in zip(model.model.layers, plain.model.layers, strict=True):
        weight = other.self_attn.v_proj.weight
        with torch.no_grad():
            weight[weight.shape[0] // 2 :] = weight[: weight.shape[0] // 2]
        layer.self_attn.v_proj = FewerValues(layer.self_attn.v_proj)
    export_model(model, tmp_path / "b", **GEOMETRY, check=False)  # transformers' own attention cannot run it
    export_model(plain, tmp_path / "plain", **GEOMETRY)
    ids = random_ids(1, S + 6 * W)
    with Session.load(tmp_path / "b", threads=1) as got, Session.load(tmp_path / "plain", threads=1) as wanted:
        for column in ids.T:
            np.testing.assert_allclose(got.step(column), wanted.step(column), rtol=0, atol=1e-4)
