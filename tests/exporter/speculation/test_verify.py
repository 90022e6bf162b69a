"""Bundles with a verify graph: logits and committed states beside a stream that is fed plainly, and refusals."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sinkexport.config import ExportConfig
from sinkrt import Session
from sinkrt.backends.cpu_library import is_usable
from sinkrt.contract.drafts import rows_by_state
from sinkrt.errors import BundleError, UsageError

from tests.exporter.tiny_models import tiny_model
from tests.exporter.variants.test_head_windows import window_file
from tests.runtime.faults import load_faulty
from tests.support import SharedExports, export_model, random_ids, refused, run_cli

GEOMETRY: dict[str, Any] = {"num_sink_tokens": 3, "window_size": 9, "chunk_size": 5, "batch": 3, "speculate": 4}
TOLERANCE = {"fp": 1e-4, "int8": 2e-2}
"""Share of the largest logit. In an INT8 window single entries are rounded the other way, as in chunks."""


def visible(session: Session, stream: int) -> dict[str, np.ndarray]:
    """Rows of a stream's states that a later token can see, oldest first, scales multiplied in."""
    states = {name: np.asarray(state)[stream] for name, state in session.buffers.items() if "." in name}
    position, found = int(session.position[stream]), {}
    for name, state in states.items():
        kind, _, rest = name.partition(".")
        if kind.endswith("scale"):
            continue
        if kind.startswith("sink"):
            found[name] = state[:, :position]
            continue
        num_sinks, window = (states[f"sink_k.{rest}"].shape[1] if f"sink_k.{rest}" in states else 0), state.shape[1]
        tokens = np.arange(max(num_sinks, position - window + 1), position)
        found[name] = state[:, (tokens - num_sinks) % window].astype(np.float64)
        if f"{kind}_scale.{rest}" in states and state.shape[2] == 16:  # latent rows have two scales
            found[name] *= states[f"{kind}_scale.{rest}"][:, (tokens - num_sinks) % window, None]
    return found


def assert_drafts_are_plain_tokens(path: Path, *, kv: str = "fp", rounds: int = 60, seed: int = 0) -> None:
    """Run rounds of drafts, some of whose tokens are committed, beside a session that is fed these tokens by steps."""
    drafted, plain = (Session.load(path, threads=1) for _ in range(2))
    random = np.random.default_rng(seed)
    most, batch = drafted.num_drafts + 1, drafted.batch
    limit = TOLERANCE[kv]
    for _ in range(rounds):
        streams = sorted(random.choice(batch, size=random.integers(1, batch + 1), replace=False).tolist())
        counts = random.integers(1, most + 1, len(streams))
        taken = np.array([random.integers(0, count + 1) for count in counts])
        ids = random_ids(len(streams), most, seed=int(random.integers(2**31)))
        logits = drafted.verify(ids, counts, streams)
        for row, stream in enumerate(streams):
            start = plain.copy_stream(stream)
            wanted = [plain.step(ids[row, i : i + 1], [stream])[stream].copy() for i in range(counts[row])]
            np.testing.assert_allclose(
                logits[stream, : counts[row]], wanted, atol=limit * np.abs(wanted).max(), err_msg=f"{start.position}"
            )
            plain.place_stream(stream, start)
            for i in range(taken[row]):
                plain.step(ids[row, i : i + 1], [stream])
        first = np.minimum(taken, 1)
        drafted.commit(first, streams)
        drafted.commit(taken - first, streams)
        np.testing.assert_array_equal(drafted.position, plain.position)
        for stream in range(batch):
            if plain.position[stream]:
                np.testing.assert_array_equal(drafted.recent_ids(stream), plain.recent_ids(stream))
                wanted = plain.logits[stream]
                np.testing.assert_allclose(drafted.logits[stream], wanted, atol=limit * np.abs(wanted).max())
    for stream in range(batch):
        seen = visible(plain, stream)
        for name, rows in visible(drafted, stream).items():
            np.testing.assert_allclose(rows, seen[name], atol=limit * max(1.0, np.abs(seen[name]).max()), err_msg=name)
    assert plain.position.min() > 6 * drafted.window_size


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gemma3n_text", "bloom", "gpt_oss", "deepseek_v2", "ministral3", "mixtral"]
)
def test_drafts_of_families(family: str, shared_export: SharedExports) -> None:
    """Plain, sliding windows, shared caches, ALiBi, sink logits, latent rows, queries by position, MoE."""
    assert_drafts_are_plain_tokens(shared_export(family, **GEOMETRY).path)


@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v2"])
def test_drafts_and_an_int8_window(family: str, shared_export: SharedExports) -> None:
    assert_drafts_are_plain_tokens(shared_export(family, **GEOMETRY, kv="int8").path, kv="int8")


@pytest.mark.usefixtures("cpu_library")
@pytest.mark.parametrize("kv", ["fp", "int8"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "gemma3n_text", "bloom"])
def test_drafts_in_the_cpu_library(family: str, kv: str, shared_export: SharedExports) -> None:
    assert is_usable()
    assert_drafts_are_plain_tokens(shared_export(family, **GEOMETRY, kv=kv, target="cpu").path, kv=kv)


@pytest.mark.usefixtures("cpu_library")
@pytest.mark.parametrize("target", ["onnx", "cpu"])
def test_drafts_of_one_stream_that_fill_the_window(target: str, tmp_path: Path) -> None:
    """T = W, and rows that do not count are left out of matmuls."""
    sizes = {"num_sink_tokens": 2, "window_size": 6, "chunk_size": 6, "speculate": 5, "target": target}
    export_model(tiny_model("llama"), tmp_path / "b", ExportConfig(**sizes))
    assert_drafts_are_plain_tokens(tmp_path / "b")


def test_drafts_and_per_head_windows(tmp_path: Path) -> None:
    model = tiny_model("llama")
    windows = window_file("llama", ((9, 5), (7, 9)))
    export_model(model, tmp_path / "b", ExportConfig(target="onnx", budgets=windows, **GEOMETRY))
    assert_drafts_are_plain_tokens(tmp_path / "b")


def test_states_after_a_thousand_rounds(shared_export: SharedExports) -> None:
    assert_drafts_are_plain_tokens(shared_export("llama", **GEOMETRY).path, rounds=1000, seed=1)


# --- what may happen in between ---------------------------------------------------------------------------------------


@functools.cache
def ids(count: int) -> np.ndarray:
    return random_ids(1, count)


@pytest.fixture
def session(shared_export: SharedExports) -> Session:
    return Session.load(shared_export("llama", **{**GEOMETRY, "batch": 1}).path, threads=1)


def test_no_draft_changes_a_stream_before_it_is_committed(session: Session) -> None:
    session.prefill(ids(20))
    before = session.copy_stream(0)
    session.verify(ids(5))
    after = session.copy_stream(0)
    for name, state in before.states.items():
        np.testing.assert_array_equal(after.states[name], state)
    assert (after.position, after.recent_ids.tolist()) == (before.position, before.recent_ids.tolist())
    np.testing.assert_array_equal(after.logits, before.logits)
    assert session.num_verified.tolist() == [5]


@pytest.mark.parametrize("how", ["step", "prefill", "reset", "place", "load"])
def test_drafts_are_forgotten_when_a_stream_is_fed_otherwise(how: str, session: Session, tmp_path: Path) -> None:
    session.prefill(ids(4))
    copy = session.copy_stream(0)
    session.save_state(tmp_path / "state")
    session.verify(ids(3))
    calls = {
        "step": lambda: session.step([1]),
        "prefill": lambda: session.prefill(ids(5)),
        "reset": session.reset,
        "place": lambda: session.place_stream(0, copy),
        "load": lambda: session.load_state(tmp_path / "state"),
    }
    calls[how]()
    assert session.num_verified.tolist() == [0]
    with refused("tokens of stream 0", "received 1", "expected 0 .. 0", error=UsageError):
        session.commit([1])
    session.commit([0])


def test_bad_drafts(session: Session) -> None:
    with refused("tokens to verify", "received 6", "at most 5", error=UsageError):
        session.verify(ids(6))
    with refused("received no tokens", error=UsageError):
        session.verify([])
    session.verify(ids(2))
    for counts in ([3], [-1]):
        with refused("expected 0 .. 2", error=UsageError):
            session.commit(counts)
    with refused("counts", "received 2", error=UsageError):
        session.commit([1, 1])
    assert session.position.tolist() == [0]


def test_a_run_that_fails_can_be_repeated(shared_export: SharedExports) -> None:
    session, backend = load_faulty(shared_export("llama", **{**GEOMETRY, "batch": 1}).path)
    session.prefill(ids(7))
    wanted = session.verify(ids(5)).copy()
    verifier = backend.real.load_verifier()
    real = verifier.run
    verifier.run = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        session.verify(ids(5))
    assert session.num_verified.tolist() == [0]
    verifier.run = real
    np.testing.assert_array_equal(session.verify(ids(5)), wanted)


def test_a_commit_that_is_cut_short_is_made_up_for(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between two states: the next call writes the rest first, whatever it is."""
    from sinkrt.state_rows import StateRows

    session.prefill(ids(20))
    start = session.copy_stream(0)
    session.verify(ids(5))
    session.commit([4])
    wanted = session.copy_stream(0)
    session.place_stream(0, start)
    session.verify(ids(5))
    real = StateRows.write

    def interrupted(rows: StateRows, *arguments: int) -> None:
        real(rows, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(StateRows, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.commit([4])
    monkeypatch.setattr(StateRows, "write", real)
    found = session.copy_stream(0)
    assert found.position == wanted.position
    for name, state in wanted.states.items():
        np.testing.assert_array_equal(found.states[name], state)
    np.testing.assert_array_equal(found.logits, wanted.logits)


# --- exports and manifests --------------------------------------------------------------------------------------------


def test_the_graphs_share_their_weights(shared_export: SharedExports) -> None:
    plain, more = (shared_export("llama", **{**GEOMETRY, "speculate": k}) for k in (None, 4))
    assert more.manifest.files["weights.bin"] == plain.manifest.files["weights.bin"]
    assert more.manifest.fingerprint == plain.manifest.fingerprint
    assert more.manifest.num_drafts == 4
    assert plain.manifest.num_drafts == 0
    assert set(rows_by_state(more.manifest)) == {state.input for state in more.manifest.states}


def test_a_bundle_without_the_graph_says_how_to_get_one(shared_export: SharedExports) -> None:
    session = shared_export("llama", **{**GEOMETRY, "speculate": None}).session()
    with refused("speculate", "without a graph that verifies drafts", "--speculate", error=UsageError):
        session.verify(ids(2), streams=[0])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"speculate": 0}, ("speculate", "received 0", "1 .. ")),
        ({"speculate": 9, "chunk_size": 9}, ("--speculate", "9 drafted tokens", "at most 8", "--window")),
        ({"speculate": 5}, ("--speculate", "5 drafted tokens", "at most 4", "--chunk")),
        ({"speculate": 2, "target": "tensorrt"}, ("--speculate", "target tensorrt", "onnx or cpu")),
    ],
)
def test_bad_lengths(fields: dict[str, Any], expected: tuple[str, ...]) -> None:
    sizes = {"num_sink_tokens": 2, "window_size": 9, "chunk_size": 4, "target": "onnx"}
    with refused(*expected, error=UsageError):
        ExportConfig(**{**sizes, **fields})


@pytest.mark.parametrize(
    ("family", "expected"),
    [("qwen3_next", "recurrent states"), ("gemma3_text", "a window of 5")],
)
def test_models_that_cannot_verify(family: str, expected: str, tmp_path: Path) -> None:
    sizes = {"num_sink_tokens": 2, "window_size": 12, "chunk_size": None, "target": "onnx", "speculate": 5}
    with refused("--speculate", expected, error=UsageError):
        export_model(family, tmp_path / "b", ExportConfig(**sizes))


def test_a_manifest_whose_verify_graph_does_not_fit(shared_export: SharedExports) -> None:
    text = shared_export("llama", **GEOMETRY).manifest.to_json()
    manifest = type(shared_export("llama", **GEOMETRY).manifest)
    for old, new in (('"logits"', '"logit"'), ("window_k.1.rows", "window_k.7.rows")):
        with pytest.raises(BundleError):
            manifest.from_json(text.replace(old, new))


def test_export_from_the_command_line(tmp_path: Path) -> None:
    run_cli("export", tmp_path / "nothing", "-o", tmp_path / "b", "--speculate", 0).refusal("speculate", "1 .. ")
