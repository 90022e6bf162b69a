"""Bundles of schema 7 in both runtimes: caches of several sizes, latent ones, recurrent states, no attention at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import transformers
from sinkexport.config import ExportConfig
from sinkrt import Session
from sinkrt.answer import AnswerParams
from sinkrt.contract import RECURRENT_KINDS
from sinkrt.contract.constants import LAYOUT_METADATA
from sinkrt.contract.layout import graph_layout
from sinkrt.sampler import SamplingParams
from sinkrt.scheduler import Scheduler

from tests.cpp.probe import Probe
from tests.exporter.graph.in_place import assert_states_are_written_last
from tests.exporter.tiny_models import COMMON, VOCAB_SIZE, random_model, tiny_model, tiny_tokenizer
from tests.support import export_model, random_ids, run_cli

SINKS, WINDOW, BATCH, CHUNK = 2, 7, 3, 4
UNEVEN = {
    "heads by layer": (
        "Gemma4TextConfig",
        {
            **COMMON,
            "num_hidden_layers": 3,
            "head_dim": 8,
            "global_head_dim": 12,
            "num_global_key_value_heads": 1,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "attention_k_eq_v": True,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
        },
    ),
    "value heads of another size": (
        "MiMoV2FlashConfig",
        {
            **COMMON,
            "num_attention_heads": 8,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "sliding_attention"],
            "mlp_layer_types": ["dense", "dense"],
            "head_dim": 16,
            "v_head_dim": 8,
        },
    ),
}
NAMES = {"latent and recurrent": "kimi_linear", "no attention": "rwkv", "state beside a cache": "zaya"}

SHOWN = {
    "heads by layer": ("3: 3 with attention", "88 numbers a token", "2 layers with a sliding window of 5"),
    "value heads of another size": ("192 numbers a token, all layers together",),
    "latent and recurrent": ("2: 1 with attention, 1 recurrent", "24 numbers a token", "sink latent rows"),
    "no attention": ("3: 3 recurrent", "constant state in 3 layers; 0.0029 MB a stream"),
    "state beside a cache": ("2 x 6 query heads, 2 key heads of 8", "64 numbers a token"),
}
"""What `inspect` shows of each besides."""


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle and what it is an example of."""

    name: str
    folder: Path


@pytest.fixture(scope="module", params=[*UNEVEN, *NAMES])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    name = request.param
    if name in UNEVEN:
        config_class, arguments = UNEVEN[name]
        model = random_model(getattr(transformers, config_class)(**arguments))
    else:
        model = tiny_model(NAMES[name])
    folder = tmp_path_factory.mktemp("uneven") / "bundle"
    export_model(model, folder, ExportConfig(SINKS, WINDOW, batch=BATCH, chunk_size=CHUNK), tokenizer=tiny_tokenizer())
    return Bundle(name, folder)


@pytest.fixture
def session(bundle: Bundle) -> Iterator[Session]:
    with Session.load(bundle.folder, threads=1) as session:
        yield session


def test_the_manifest_says_what_is_kept(bundle: Bundle, session: Session) -> None:
    manifest = session.manifest
    found = [(cache.num_q_heads, cache.num_kv_heads, cache.key_dim, cache.value_dim) for cache in manifest.caches]
    kinds = {state.kind for state in manifest.states}
    if bundle.name == "heads by layer":
        assert found == [(6, 2, 8, 8), (6, 2, 8, 8), (6, 1, 12, 12)]
        words = "2 x 6 query heads, 2 key heads of 8"
    elif bundle.name == "value heads of another size":
        assert found == [(8, 4, 16, 8)] * 2
        words = "2 x 8 query heads, 4 key heads of 16, values of 8"
    elif bundle.name == "latent and recurrent":
        assert [cache.latent for cache in manifest.caches] == [True] and not kinds & {"sink_v", "window_v"}
        words = "query heads over latent rows of 24 (16 of them values)"
    elif bundle.name == "no attention":
        assert manifest.attention == () and kinds <= set(RECURRENT_KINDS)
        words = "none: no attention, constant state"
    else:
        assert manifest.attention is None and kinds > {"window_v", "conv"}
        words = "layers, 2 of them beside a cache"
    assert_states_are_written_last(bundle.folder, manifest)
    for part in (words, *SHOWN[bundle.name]):
        assert part in run_cli("inspect", bundle.folder).out, part
    for graph in manifest.graphs.values():
        metadata = onnx.load(bundle.folder / graph.file, load_external_data=False).metadata_props
        found_layout = {entry.key: entry.value for entry in metadata}.get(LAYOUT_METADATA)
        assert found_layout == graph_layout(manifest) and (found_layout is None) == (manifest.attention is None)
    assert ("recurrent states" in run_cli("inspect", bundle.folder, "--memory").out) == manifest.is_recurrent


def test_steps_chunks_and_idle_streams_agree(session: Session) -> None:
    """Past six wraps, each stream in pieces of its own while others stand still."""
    length = 6 * (SINKS + WINDOW) + 5
    ids = random_ids(BATCH, length)
    stepped = np.stack([session.step(column).copy() for column in ids.T], axis=1)  # [B, N, V]
    assert session.position.tolist() == [length] * BATCH
    wanted = [session.copy_stream(stream) for stream in range(BATCH)]
    session.reset()
    random = np.random.default_rng(7)
    while (behind := np.flatnonzero(session.position < length)).size:
        stream = int(random.choice(behind))
        start = int(session.position[stream])
        end = min(length, start + int(random.integers(1, 2 * (SINKS + WINDOW))))
        idle = [other for other in range(BATCH) if other != stream]
        before = [session.copy_stream(other) for other in idle]
        logits = session.prefill(ids[[stream], start:end], streams=[stream])
        np.testing.assert_allclose(logits[stream], stepped[stream, end - 1], rtol=1e-4, atol=1e-4)
        for other, kept in zip(idle, before, strict=True):
            after = session.copy_stream(other)
            assert after.position == kept.position
            np.testing.assert_array_equal(after.logits, kept.logits)
            for state in session.manifest.states:
                if state.kind in RECURRENT_KINDS:  # others have a slot that nothing reads
                    np.testing.assert_array_equal(after.states[state.input], kept.states[state.input])
    for number, whole in enumerate(wanted):
        session.place_stream(number, whole)
    logits = session.step(ids[:, 0]).copy()
    session.reset()
    session.prefill(random_ids(BATCH, 11, seed=3))
    for number, whole in enumerate(wanted):
        session.place_stream(number, whole)
    np.testing.assert_array_equal(session.step(ids[:, 0]), logits)


def test_reset_and_saved_states(session: Session, tmp_path: Path) -> None:
    prompt, more = random_ids(BATCH, 3 * (SINKS + WINDOW)), random_ids(BATCH, 9, seed=2)
    session.prefill(prompt)
    session.save_state(tmp_path / "state")
    wanted = session.prefill(more).copy()
    session.reset()
    assert not any(np.asarray(session.buffers[state.input]).any() for state in session.manifest.states)
    session.load_state(tmp_path / "state")
    np.testing.assert_array_equal(session.prefill(more), wanted)
    session.reset(streams=[1])
    session.prefill(prompt[[1]], streams=[1])
    np.testing.assert_allclose(session.prefill(more[[1]], streams=[1])[1], wanted[1], rtol=1e-4, atol=1e-4)


def test_the_same_tokens_and_states_in_cpp(bundle: Bundle, session: Session, probe: Probe, tmp_path: Path) -> None:
    prompt, count = random_ids(BATCH, 21), 5 * (SINKS + WINDOW)
    session.prefill(prompt)
    want: list[list[int]] = [[] for _ in range(BATCH)]
    for _ in range(count):
        ids = session.logits.argmax(axis=1)
        for row, token in zip(want, ids.tolist(), strict=True):
            row.append(token)
        session.step(ids)
    assert probe.steps(bundle.folder, prompt, count, tmp_path / "cpp", ignore_eos=True) == want
    session.save_state(tmp_path / "python")
    assert (tmp_path / "cpp").read_bytes() == (tmp_path / "python").read_bytes()


def test_more_conversations_than_streams(session: Session) -> None:
    """They are copied out and back in: each says what it says alone."""
    prompts = random_ids(2 * BATCH, 13, seed=5)
    params = AnswerParams(max_tokens=12, ignore_eos=True)
    scheduler = Scheduler(session)
    heard = {f"c{number}": "" for number in range(len(prompts))}
    for name, prompt in zip(heard, prompts, strict=True):
        scheduler.submit(name, prompt, SamplingParams(temperature=0), params)
    while scheduler.has_work:
        for event in scheduler.step():
            heard[event.conversation] += event.text
    session.reset()
    for name, prompt in zip(heard, prompts, strict=True):
        logits = session.prefill(prompt, streams=[0])
        alone = []
        for _ in range(12):
            alone.append(int(logits[0].argmax()))
            logits = session.step(alone[-1:], streams=[0])
        session.reset(streams=[0])
        assert heard[name].split() == session.tokenizer.decode(alone).split()
