"""Positions elsewhere than in a plain rotation: complex numbers, other pairs, weights after it, scales of queries."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sinkexport.config import ExportConfig
from sinkexport.families.layout import NoLayoutError, find_layout
from sinkexport.families.probe import probe_attention
from sinkexport.families.rope import (
    COMPLEX,
    ModelRotary,
    RotarySpec,
    RotaryTable,
    identity_rotary,
    replaced_rotary,
    rotary_modules,
    rotate,
)
from sinkexport.model.decoder import StreamStep
from sinkexport.model.tracing import trace
from sinkexport.reference.calls import calls_reference
from sinkexport.reference.chunked import chunked_streaming
from sinkrt import Session, UsageError

from tests.exporter.tiny_models import tiny_model
from tests.exporter.tiny_positions import POSITIONED
from tests.support import export_model, nightly_but, random_ids, refused

GEOMETRY = {"num_sink_tokens": 2, "window_size": 9}
C, WRAPS = 11, 6


def followed(model: Any, ids: np.ndarray) -> np.ndarray:
    """Logits [B, N, vocab] of the call-following reference."""
    with calls_reference(model, *GEOMETRY.values()) as reference:
        return torch.stack(list(reference.logits(torch.from_numpy(ids))), dim=1).float().numpy()


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()


# Bundles.


@pytest.mark.parametrize(
    "name", nightly_but(["granite_swa", "hunyuan_v1_dense", "llama4_text", "ministral3"], sorted(POSITIONED))
)
def test_dense_and_streaming(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    config = ExportConfig(**GEOMETRY, batch=3, chunk_size=4)
    ids = random_ids(3, C + WRAPS * 9 + 3)
    with torch.no_grad():
        dense = model(torch.from_numpy(ids[:, :C]), use_cache=False).logits.numpy()
    wanted = followed(model, ids)
    export_model(model, tmp_path / "bundle", config, check=False)
    with Session.load(tmp_path / "bundle", threads=1) as session:
        steps = np.stack([session.step(column).copy() for column in ids.T], axis=1)
        assert_close(steps[:, :C], dense)
        assert_close(steps, wanted)
        session.reset()
        random = np.random.default_rng(5)
        while (behind := np.flatnonzero(session.position < ids.shape[1])).size:
            streams = random.choice(behind, random.integers(1, behind.size + 1), replace=False)
            at = session.position[streams]
            counts = np.minimum(random.integers(1, 2 * C, streams.size), ids.shape[1] - at)
            rows = np.zeros((streams.size, counts.max()), dtype=np.int64)
            for row, stream, start, count in zip(rows, streams, at, counts, strict=True):
                row[:count] = ids[stream, start : start + count]
            logits = session.prefill(rows, counts, streams)
            for stream, end in zip(streams, at + counts, strict=True):
                assert_close(logits[stream], wanted[stream, end - 1])


@pytest.mark.parametrize("name", ["hunyuan_v1_dense", "llama4_text", "ministral3", "nanochat"])
def test_chunked_streaming_equals_the_reference(name: str) -> None:
    model = tiny_model(name)
    ids = random_ids(2, C + 3 * 9)
    wanted = followed(model, ids)
    for chunk in (4, 25):
        with chunked_streaming(model, *GEOMETRY.values()) as stream:
            pieces = [stream.feed(piece) for piece in torch.from_numpy(ids).split(chunk, dim=1)]
        assert_close(torch.cat(pieces, dim=1).numpy(), wanted)


@pytest.mark.parametrize("name", ["hunyuan_v1_dense", "ministral3", "llama4_text"])
def test_positions_elsewhere_matter(name: str) -> None:
    """What the tests above compare would differ: factors and weights are no decoration of these tiny models."""
    model, ids = tiny_model(name), random_ids(1, 2 * C)
    changes: dict[str, Any] = {
        "ministral3": {
            "rope_parameters": {**POSITIONED["ministral3"][1]["rope_parameters"], "llama_4_scaling_beta": 0.0}
        },
        "llama4_text": {"attn_temperature_tuning": False},
    }.get(name, {})
    other = tiny_model(name, **changes)
    if name == "hunyuan_v1_dense":
        for layer in other.model.layers:
            torch.nn.init.ones_(layer.self_attn.key_layernorm.weight)
    assert np.abs(followed(model, ids) - followed(other, ids)).max() > 1e-2


def test_scales_are_measured_in_half_precision_too() -> None:
    half, full = (
        probe_attention(tiny_model("llama4_text", dtype=dtype), 2, C)[1].query_scales
        for dtype in (torch.float16, torch.float32)
    )
    assert half.keys() == full.keys() == {1}
    torch.testing.assert_close(half[1], full[1], rtol=1e-3, atol=0)
    wanted = 1 + 0.3 * torch.log1p(torch.floor((torch.arange(C) + 1.0) / 2))
    torch.testing.assert_close(full[1], wanted.double(), rtol=1e-5, atol=0)


# Complex numbers.


@pytest.mark.parametrize("moe_layers", [[], [1]])  # experts write in place: the trace then has other operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_complex_number_is_left_in_a_trace(moe_layers: list[int], dtype: torch.dtype) -> None:
    model = tiny_model("llama4_text", moe_layers=moe_layers, dtype=dtype)
    config = ExportConfig(**GEOMETRY, chunk_size=4)
    shape, rotary = probe_attention(model, 2, C)
    assert {table.cos_layout for table in rotary.tables.values()} == {COMPLEX}
    nodes = trace(StreamStep(model, config, shape, rotary, batch=1, num_tokens=1)).graph.nodes
    targets = [str(node.target) for node in nodes if node.op == "call_function"]
    assert not [target for target in targets if "complex" in target or "view_as_real" in target]


# Pairs of dimensions.


@dataclasses.dataclass(frozen=True)
class Given:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layer: int = 3


D, P, T = 12, 4, 4
ANGLES = torch.linspace(0.3, 2.7, P, dtype=torch.float64) + 0.4 * torch.arange(T, dtype=torch.float64)[:, None]


def given_pair(spec: RotarySpec, scaling: float = 1.0) -> tuple[Given, Given]:
    """Random queries, keys and values, unrotated and turned."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, T, D, generator=generator, dtype=torch.float64) for heads in (6, 2, 2))
    turned = (rotate(x, ANGLES.cos() * scaling, ANGLES.sin() * scaling, spec) for x in (q, k))
    return Given(q, k, v), Given(*turned, v)


def found(pair: tuple[Given, Given], scaling: float = 1.0) -> RotarySpec:
    table = RotaryTable(torch.zeros(P, dtype=torch.int64), scaling)
    return find_layout(*pair, {"": table}, {"": ANGLES}, torch.float32)


HALVES = tuple(range(D))
REVERSED = (*range(P, 2 * P), *range(P), *range(2 * P, D))
TRAILING = (*range(D - 2 * P, D), *range(D - 2 * P))
NEIGHBOURS_LAST = (*range(D - 2 * P, D, 2), *range(D - 2 * P + 1, D, 2), *range(D - 2 * P))
MIXED = (7, 0, 11, 4, 2, 9, 1, 10, 3, 5, 6, 8)


@pytest.mark.parametrize("order", [REVERSED, TRAILING, NEIGHBOURS_LAST, MIXED])
@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_any_pairing_is_found(order: tuple[int, ...], scaling: float) -> None:
    pair = given_pair(RotarySpec(2 * P, interleaved=False, order=order), scaling)
    assert found(pair, scaling) == RotarySpec(2 * P, interleaved=False, order=order)


def test_leading_pairs_have_no_order() -> None:
    for interleaved in (False, True):
        spec = RotarySpec(2 * P, interleaved=interleaved)
        assert found(given_pair(spec)) == spec
    assert found(given_pair(RotarySpec(2 * P, interleaved=False, order=HALVES))).order is None


def test_what_is_no_rotation_has_no_pairing() -> None:
    before, after = given_pair(RotarySpec(2 * P, interleaved=False, order=MIXED))
    for other in (
        dataclasses.replace(after, k=after.k * 1.01),
        dataclasses.replace(after, q=after.q.roll(1, dims=-1)),
        dataclasses.replace(after, k=given_pair(RotarySpec(2 * P, interleaved=False, order=TRAILING))[1].k),
    ):
        with pytest.raises(NoLayoutError):
            found((before, other))
    with pytest.raises(NoLayoutError):
        found((before, after), scaling=1.3)
    with refused("values that turn in layer 3", error=UsageError):
        found((before, dataclasses.replace(after, v=after.v * 2)))


# Weights after the rotation.


def test_a_norm_that_does_more_than_multiply_by_its_weight_is_refused() -> None:
    model = tiny_model("hunyuan_v1_dense")
    norm = model.model.layers[1].self_attn.key_layernorm
    norm.register_forward_hook(lambda _module, _arguments, output: output + 0.1)
    with refused("more than a rotation of their unrotated selves in layer 1", error=UsageError):
        probe_attention(model, 2, C)


def test_equal_weights_within_a_pair_need_nothing() -> None:
    model = tiny_model("hunyuan_v1_dense")
    for layer in model.model.layers:
        for norm in (layer.self_attn.query_layernorm, layer.self_attn.key_layernorm):
            with torch.no_grad():
                norm.weight.copy_(norm.weight[:8].repeat(2))
    assert all(spec.norms == () for spec in probe_attention(model, 2, C)[1].calls)


def test_weights_after_the_rotation_need_the_portable_graph(tmp_path: Path) -> None:
    model = tiny_model("hunyuan_v1_dense", hidden_size=96, head_dim=64)
    with refused("weights of norms after the rotation", "--target", error=UsageError):
        export_model(model, tmp_path / "out", **GEOMETRY, target="tensorrt")


# Positions that are read elsewhere.


@pytest.mark.parametrize("at", [0, 1])
def test_hidden_states_that_depend_on_positions_are_refused(at: int) -> None:
    model = tiny_model("ministral3")

    def scaled(_module: Any, arguments: Any, named: dict[str, Any]) -> Any:
        factor = 1 + 1e-2 * named["position_ids"].float()[..., None]
        return (arguments[0] * factor, *arguments[1:]), named

    model.model.layers[at].register_forward_pre_hook(scaled, with_kwargs=True)
    with refused("a use outside the rotary embedding", error=UsageError):
        probe_attention(model, 2, C)


def test_chunks_that_are_smaller_than_the_cache_are_refused_with_their_size(tmp_path: Path) -> None:
    model = tiny_model("llama4_text", attention_chunk_size=10)
    with refused("11 cached tokens, and chunks of 10 tokens in layer 0", "--window", error=UsageError):
        export_model(model, tmp_path / "out", **GEOMETRY)


# Stand-ins.


def test_stand_ins_have_what_the_original_has_and_leave_again() -> None:
    model = tiny_model("granite_swa")
    rotary, dtype = probe_attention(model, 3, C)[1], torch.float32
    names = {table.module for table in rotary.tables.values()}
    assert names == {"model.rotary_embs.0", "model.rotary_embs.1"}  # not the base class's, which nothing calls
    originals = {name: model.get_submodule(name) for name in names}
    with replaced_rotary(model, identity_rotary(rotary, 1, 2, dtype)):
        for name, original in originals.items():
            stand_in = model.get_submodule(name)
            assert stand_in is not original
            assert stand_in.config is original.config
            with pytest.raises(AttributeError):
                _ = stand_in.nothing
    assert {name: model.get_submodule(name) for name in names} == originals


def test_an_embedding_that_layers_share_is_replaced_everywhere() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.shared = model.model.rotary_emb
    (name,) = rotary_modules(model)
    rotary = ModelRotary({"": RotaryTable(torch.zeros(8, dtype=torch.int64), 1.0, name)}, ())
    with replaced_rotary(model, identity_rotary(rotary, 1, 2, torch.float32)):
        assert len({layer.shared for layer in model.model.layers} | {model.model.rotary_emb}) == 1
        assert model.model.rotary_emb(None, None)[0].shape == (1, 2, 16)
    assert model.model.layers[0].shared is model.model.rotary_emb


def test_tables_that_turn_alike_are_one() -> None:
    specs = probe_attention(tiny_model("moshi"), 2, C)[1].calls
    assert len({spec.table for spec in specs}) == 1
