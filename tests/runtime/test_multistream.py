"""Streams of one session that go their own ways: chunks, idle streams, copies, and chunks that are cut short."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sinkrt import BackendError, Session, StateError, UsageError

from tests.runtime.faults import load_faulty
from tests.runtime.toy import VOCAB_SIZE, Toy, build_toy, reference_logits, toy_ids

TOYS = [
    Toy(chunk_size=4),
    Toy(batch=3, chunk_size=6),
    Toy(num_sink_tokens=0, window_size=5, batch=2, chunk_size=5),
    Toy(num_sink_tokens=5, window_size=3, batch=2, chunk_size=2),
    Toy(batch=2, chunk_size=1),
]


@pytest.mark.parametrize("toy", TOYS, ids=str)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_schedule_gives_what_each_stream_gives_alone(toy: Toy, tmp_path_factory: Any, data: st.DataObject) -> None:
    """Steps and prefills of random streams and lengths, resets and moves between streams."""
    folder = tmp_path_factory.getbasetemp() / f"toy-{abs(hash(toy))}"
    with Session.load(folder if folder.exists() else build_toy(folder, toy), threads=1) as session:
        fed: list[list[int]] = [[] for _ in range(toy.batch)]
        for _ in range(data.draw(st.integers(4, 12))):
            chosen = data.draw(st.sets(st.integers(0, toy.batch - 1), min_size=1))
            streams = data.draw(st.permutations(sorted(chosen)))
            action = data.draw(st.sampled_from(["step", "prefill", "prefill", "reset", "move"]))
            if action == "reset":
                session.reset(streams)
                for stream in streams:
                    fed[stream] = []
            elif action == "move":
                session.place_stream(streams[0], session.copy_stream(streams[-1]))
                fed[streams[0]] = list(fed[streams[-1]])
            else:
                counts = [1 if action == "step" else data.draw(st.integers(1, 3 * toy.capacity)) for _ in streams]
                rows = [toy_ids(max(counts), seed=data.draw(st.integers(0, 99))).tolist() for _ in streams]
                for stream, row, count in zip(streams, rows, counts, strict=True):
                    fed[stream] += row[:count]
                if action == "step":
                    session.step([row[0] for row in rows], streams)
                else:
                    session.prefill(rows, counts, streams)
            assert session.position.tolist() == [len(ids) for ids in fed]
        for stream, ids in enumerate(fed):
            if ids:
                np.testing.assert_allclose(session.logits[stream], reference_logits(toy, ids)[-1], atol=3e-5)
                assert session.recent_ids(stream).tolist() == ids[-toy.capacity :]


@pytest.mark.parametrize("toy", [toy for toy in TOYS if toy.batch > 1], ids=str)
def test_an_idle_stream_is_left_alone_to_the_bit(toy: Toy, tmp_path: Path) -> None:
    """What others do between its tokens changes nothing, wherever they write: before S, before C and after."""
    with Session.load(build_toy(tmp_path / "bundle", toy), threads=1) as session:
        ids = toy_ids(3 * toy.capacity).tolist()
        alone = [session.step([i], [0])[0].copy() for i in ids]
        session.reset()
        random = np.random.default_rng(0)
        for i, want in zip(ids, alone, strict=True):
            before = session.logits[0].copy()
            others = list(range(1, toy.batch))
            for _ in range(random.integers(0, 3)):
                session.step(random.integers(0, VOCAB_SIZE, len(others)), others)
            session.prefill(random.integers(0, VOCAB_SIZE, (len(others), 5)), streams=others)
            np.testing.assert_array_equal(session.logits[0], before)
            np.testing.assert_array_equal(session.step([i], [0])[0], want)


def test_chunk_of_another_bundle_size_is_what_the_manifest_says(tmp_path: Path) -> None:
    with Session.load(build_toy(tmp_path / "bundle", Toy(chunk_size=5)), threads=1) as session:
        assert session.chunk_size == 5
        assert set(session.manifest.graphs) == {"decode", "prefill"}


@pytest.fixture
def pair(tmp_path: Path) -> Session:
    return Session.load(build_toy(tmp_path / "bundle", Toy(batch=2, chunk_size=4)), threads=1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: s.step([1], [2]), "stream 2"),
        (lambda s: s.step([1], [-1]), "stream -1"),
        (lambda s: s.step([1, 1], [0, 0]), "each once"),
        (lambda s: s.step([], []), "each once"),
        (lambda s: s.step([1, 2], [0]), "ids"),
        (lambda s: s.prefill([[1, 2]], [0], [0]), "num_valid"),
        (lambda s: s.prefill([[1, 2]], [3], [0]), "num_valid"),
        (lambda s: s.prefill([[1, 2]], [1, 1], [0]), "num_valid"),
        (lambda s: s.prefill([[1, 2]], [1.5], [0]), "num_valid"),
        (lambda s: s.prefill([[]], None, [0]), "prompt"),
        (lambda s: s.prefill([[1, 2], [1]]), "ids"),
        (lambda s: s.reset([5]), "stream 5"),
        (lambda s: s.copy_stream(7), "stream 7"),
        (lambda s: s.place_stream(9, s.copy_stream(0)), "stream 9"),
        (lambda s: s.recent_ids(3), "stream 3"),
        (lambda s: s.generate("a"), "batch 1"),
    ],
)
def test_what_callers_get_wrong_is_one_line_and_feeds_nothing(pair: Session, call: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        call(pair)
    assert "\n" not in str(caught.value)
    assert pair.position.tolist() == [0, 0]


def test_a_copy_of_another_bundle_is_refused(pair: Session, session: Session) -> None:
    with pytest.raises(UsageError, match="another bundle"):
        session.place_stream(0, dataclasses.replace(pair.copy_stream(0), states={}))


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[tuple[Session, Any]]:
    """A session of two streams and its `FaultyBackend`."""
    session, backend = load_faulty(build_toy(tmp_path / "pair", Toy(batch=2, chunk_size=4)))
    with session:
        yield session, backend


def cut(backend: Any, stream: int, error: BaseException, *, after: bool) -> None:
    """Let the chunks of one stream raise, before or after they have really run; ``del backend.run_chunk`` mends."""

    def run_chunk(chosen: int, ids: np.ndarray, position: int) -> None:
        if chosen != stream or after:
            backend.real.run_chunk(chosen, ids, position)
        if chosen == stream:
            raise error

    backend.run_chunk = run_chunk


def test_a_chunk_that_fails_loses_its_stream_and_no_other(faulty: tuple[Session, Any], tmp_path: Path) -> None:
    pair, backend = faulty
    ids = [toy_ids(20, seed=seed).tolist() for seed in (1, 2)]
    pair.prefill(ids)
    pair.save_state(tmp_path / "state")
    cut(backend, 1, BackendError("no memory"), after=False)
    with pytest.raises(BackendError, match="no memory"):
        pair.prefill([toy_ids(4).tolist()], streams=[1])
    del backend.run_chunk
    for call in (
        lambda: pair.step([1], [1]),
        lambda: pair.prefill([[1, 2]], streams=[1]),
        lambda: pair.copy_stream(1),
        lambda: pair.step([1, 1]),
        lambda: pair.save_state(tmp_path / "other"),
    ):
        with pytest.raises(StateError, match="stream 1: received one that an error cut short"):
            call()
    assert not (tmp_path / "other").exists()
    toy = Toy(batch=2, chunk_size=4)
    np.testing.assert_allclose(pair.step([7], [0])[0], reference_logits(toy, [*ids[0], 7])[-1], atol=3e-5)
    pair.load_state(tmp_path / "state")
    np.testing.assert_allclose(pair.step([7], [1])[1], reference_logits(toy, [*ids[1], 7])[-1], atol=3e-5)


def test_a_reset_brings_a_lost_stream_back(faulty: tuple[Session, Any]) -> None:
    pair, backend = faulty
    cut(backend, 0, BackendError("x"), after=False)
    with pytest.raises(BackendError):
        pair.prefill([[1, 2, 3, 4]], streams=[0])
    del backend.run_chunk
    pair.reset([0])
    want = reference_logits(Toy(batch=2, chunk_size=4), [1, 2, 3, 4])[-1]
    np.testing.assert_allclose(pair.prefill([[1, 2, 3, 4]], streams=[0])[0], want, atol=3e-5)


def test_an_interrupt_after_a_chunk_does_not_lose_that_it_ran(faulty: tuple[Session, Any]) -> None:
    pair, backend = faulty
    ids = toy_ids(24).tolist()
    pair.prefill([ids[:16]], streams=[0])
    cut(backend, 0, KeyboardInterrupt(), after=True)
    with pytest.raises(KeyboardInterrupt):
        pair.prefill([ids[16:]], streams=[0])
    del backend.run_chunk
    assert pair.position.tolist() == [20, 0]
    pair.prefill([ids[20:]], streams=[0])
    want = reference_logits(Toy(batch=2, chunk_size=4), ids)[-1]
    np.testing.assert_allclose(pair.logits[0], want, atol=3e-5)
