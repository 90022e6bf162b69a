"""Every family: exported bundles against Hugging Face (dense) and against the independent streaming reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sinkexport.config import ExportConfig
from sinkexport.families import EXPORTED, rotates_by_length
from sinkexport.reference.streamed import streamed_logits
from sinkrt import Session

from tests.exporter.graph.in_place import assert_states_are_written_last
from tests.exporter.tiny_models import DAILY, TINY, tiny_model
from tests.exporter.tiny_positions import POSITIONED
from tests.support import SharedExports, export_model, nightly_but, random_ids

WRAPS = 6


def exported(model: Any, folder: Path, config: ExportConfig) -> Session:
    export_model(model, folder, config)
    return Session.load(folder, threads=1)  # tiny graphs: idle threads would only spin against torch's


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float, where: str) -> None:
    """Relative to the size of what is wanted."""
    error = float(np.abs(got - want).max())
    assert error <= tolerance * max(1.0, float(np.abs(want).max())), f"{where}: error {error}"


def assert_streams_like_reference(session: Session, model: Any, ids: np.ndarray, tolerance: float) -> None:
    """Every step's logits, then those after prefilled pieces of the same streams."""
    stream = session.manifest.stream
    wanted = []
    with streamed_logits(model, torch.from_numpy(ids), stream.num_sink_tokens, stream.window_size) as streamed:
        for t, (column, logits) in enumerate(zip(ids.T, streamed.logits, strict=True)):
            wanted.append(logits.float().numpy())
            assert_close(session.step(column), wanted[-1], tolerance, f"step {t}")
    session.reset()
    random = np.random.default_rng(5)
    longest = 2 * stream.capacity + stream.chunk_size
    while (behind := np.flatnonzero(session.position < ids.shape[1])).size:
        # Some of the streams, each by a length of its own: their positions drift apart.
        streams = random.choice(behind, random.integers(1, behind.size + 1), replace=False)
        at = session.position[streams]
        counts = np.minimum(random.integers(1, longest, streams.size), ids.shape[1] - at)
        rows = np.zeros((streams.size, counts.max()), dtype=np.int64)
        for row, stream_, start, count in zip(rows, streams, at, counts, strict=True):
            row[:count] = ids[stream_, start : start + count]
        logits = session.prefill(rows, counts, streams)
        for stream_, end in zip(streams, at + counts, strict=True):
            assert_close(logits[stream_], wanted[end - 1][stream_], tolerance, f"prefill of {stream_} up to {end}")


def test_a_vocabulary_of_fewer_tokens_than_a_probe(tmp_path: Path) -> None:
    model, ids = tiny_model("llama", vocab_size=3), random_ids(1, 20, vocab_size=3, first=0)
    session = exported(model, tmp_path / "b", ExportConfig(num_sink_tokens=1, window_size=4))
    assert_streams_like_reference(session, model, ids, 1e-4)


@pytest.mark.parametrize("name", nightly_but(DAILY, sorted(TINY.keys() - POSITIONED)))
def test_dense_and_streaming(name: str, shared_export: SharedExports) -> None:
    geometry = {"num_sink_tokens": 4, "window_size": 12, "batch": 2}
    bundle, config = shared_export(name, **geometry), ExportConfig(**geometry)
    model, session = bundle.model, bundle.session()
    ids = random_ids(config.batch, config.capacity + WRAPS * config.window_size + 3)
    with torch.no_grad():
        dense = model(torch.from_numpy(ids[:, : config.capacity])).logits.numpy()
    assert_states_are_written_last(bundle.path, bundle.manifest)
    for t in range(config.capacity):
        assert_close(session.step(ids[:, t]), dense[:, t], 1e-4, f"position {t}")
    session.reset()
    assert_streams_like_reference(session, model, ids, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("phi3-partial", {"original_max_position_embeddings": 10}),
        (
            "llama",
            {
                "max_position_embeddings": 10,
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
            },
        ),
    ],
    ids=["longrope", "dynamic"],
)
def test_frequencies_that_depend_on_length_are_those_of_a_full_cache(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = ExportConfig(num_sink_tokens=4, window_size=12)
    if name == "phi3-partial":
        changes = {**changes, "rope_parameters": {**TINY[name][1]["rope_parameters"], **changes}}
    model = tiny_model(name, **changes)
    assert rotates_by_length(model.config, config.capacity)
    assert not rotates_by_length(model.config, 10)
    ids = random_ids(1, config.capacity + 3 * config.window_size)
    with torch.no_grad():
        shorter = model(torch.from_numpy(ids[:, :10])).logits.numpy()
        dense = model(torch.from_numpy(ids[:, : config.capacity])).logits.numpy()  # rotated by this text's length
        model(torch.from_numpy(ids))  # and what transformers last rotated by does not matter
    assert np.abs(dense[:, :10] - shorter).max() > 1e-2 * np.abs(shorter).max()
    session = exported(model, tmp_path / "bundle", config)
    for t in range(config.capacity):
        assert_close(session.step(ids[:, t]), dense[:, t], 1e-4, f"position {t}")
    session.reset()
    assert_streams_like_reference(session, model, ids, 1e-4)


ODD = [(7, 3, 3, 2), (0, 5, 1, 5), (1, 1, 1, 1), (0, 1, 2, 1), (4, 33, 1, 16), (9, 6, 2, 4), (2, 24, 2, 24)]


@pytest.mark.parametrize(
    ("name", "num_sinks", "window", "batch", "chunk"),
    nightly_but(
        [*(("llama", *geometry) for geometry in ODD), ("smollm3", 9, 6, 2, 4)],  # some of its layers do not rotate
        [(name, *geometry) for name in ("llama", "smollm3") for geometry in ODD],
    ),
)
def test_odd_geometries(name: str, num_sinks: int, window: int, batch: int, chunk: int, tmp_path: Path) -> None:
    config = ExportConfig(num_sink_tokens=num_sinks, window_size=window, batch=batch, chunk_size=chunk)
    model = tiny_model(name, seed=1)
    session = exported(model, tmp_path / "bundle", config)
    ids = random_ids(batch, config.capacity + WRAPS * window + 2, seed=2)
    assert_streams_like_reference(session, model, ids, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_neox", "phi3-partial", "mpt", "gpt_oss"])
def test_half_precision(name: str, tmp_path: Path) -> None:
    config = ExportConfig(num_sink_tokens=4, window_size=12, batch=1, dtype="fp16")
    model = tiny_model(name, dtype=torch.float16)
    session = exported(model, tmp_path / "bundle", config)
    assert session.manifest.weights_dtype == "float16"
    assert {state.dtype for state in session.manifest.states} == {"float16"}
    # The same weights in float32 are the truth; half precision may lose what its 11 bits lose over the layers.
    ids = random_ids(1, config.capacity + WRAPS * config.window_size)
    assert_streams_like_reference(session, model.float(), ids, 3e-2)


def test_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("llama")
    ids = torch.from_numpy(random_ids(1, 9))
    before_names = [name for name, _ in model.named_modules()]
    implementation = model.config._attn_implementation
    with torch.no_grad():
        before = model(ids).logits
        exported(model, tmp_path / "bundle", ExportConfig(2, 6))
        after = model(ids).logits
    assert torch.equal(before, after)
    assert [name for name, _ in model.named_modules()] == before_names
    assert model.config._attn_implementation == implementation


def test_every_listed_family_is_tested_here() -> None:
    tested = {name: family.family for family in EXPORTED for name in family.tested_by}
    assert {name: tiny_model(name).config.model_type for name in TINY} == tested
