"""Beginnings of prompts that conversations share: the same bits as if each had been fed its own, found by ids alone."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sinkrt import Session, UsageError
from sinkrt.answer import AnswerParams
from sinkrt.conversation import IdHistory
from sinkrt.errors import StateError
from sinkrt.graph_runner import StreamCopy
from sinkrt.prefix_folder import PrefixFolder
from sinkrt.prefix_store import MIN_PREFIX_TOKENS, PrefixStore, open_prefix_store
from sinkrt.sampler import SamplingParams
from sinkrt.scheduler import Scheduler
from sinkrt.stream_file import read_stream, save_stream

from tests.runtime.toy import Toy, build_toy, toy_ids

WIDE, NARROW = Toy(batch=2, chunk_size=16, window_size=300), Toy(batch=2, chunk_size=16, window_size=20)
MIB = 2**20
OPENING = MIN_PREFIX_TOKENS + 13
ONE_TOKEN = AnswerParams(max_tokens=1, ignore_eos=True)


@pytest.fixture(scope="module", params=[WIDE, NARROW], ids=["before-the-wrap", "after-wraps"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy(tmp_path_factory.mktemp("prefixes") / "toy", request.param)


@pytest.fixture
def session(bundle: Path) -> Iterator[Session]:
    with Session.load(bundle, threads=1) as session:
        yield session


def store_of(session: Session, max_bytes: int = MIB, folder: Path | None = None, most: int = MIB) -> PrefixStore:
    return open_prefix_store(session.manifest, max_bytes, folder, most)


def prompt(seed: int, rest: int = 9) -> np.ndarray:
    return np.concatenate([toy_ids(OPENING, seed=7), toy_ids(rest, seed=seed)])


def ask(scheduler: Scheduler, name: str, ids: np.ndarray, *, owner: str = "", opening: int = OPENING) -> int:
    """Get one token of an answer. Returns: tokens of the prompt that were not fed."""
    scheduler.submit(name, ids, SamplingParams(), ONE_TOKEN, owner=owner, opening=opening)
    known = scheduler.position(name)
    while scheduler.has_work:
        scheduler.step()
    return known


def fed(bundle: Path, *parts: np.ndarray) -> StreamCopy:
    """A stream that was fed some parts, each as a prompt of its own."""
    with Session.load(bundle, threads=1) as session:
        for part in parts:
            session.prefill(part, streams=[0])
        return session.copy_stream(0)


def same(a: StreamCopy, b: StreamCopy) -> bool:
    """Whether two streams have the same bits, but for rows that nothing has been written to."""
    rows = {name: min(a.position, states.shape[1]) for name, states in a.states.items()}
    return (
        a.position == b.position
        and all(np.array_equal(a.states[n][:, : rows[n]], b.states[n][:, : rows[n]]) for n in a.states)
        and np.array_equal(a.logits, b.logits)
        and np.array_equal(a.recent_ids, b.recent_ids)
    )


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_second_conversation_has_the_bits_of_one_that_was_fed_it_all(
    bundle: Path, session: Session, tmp_path: Path, on_disk: bool
) -> None:
    store = store_of(session, folder=tmp_path if on_disk else None)
    scheduler = Scheduler(session, prefixes=store)
    assert ask(scheduler, "first", prompt(1)) == 0
    if on_disk:
        store.close()
        store = store_of(session, folder=tmp_path)
        assert len(store) == 0
        scheduler = Scheduler(session, prefixes=store)
    assert ask(scheduler, "second", prompt(2, rest=40)) == OPENING
    token = int(fed(bundle, prompt(2, rest=40)[:OPENING], prompt(2, rest=40)[OPENING:]).logits.argmax())
    expected = fed(bundle, prompt(2, rest=40)[:OPENING], prompt(2, rest=40)[OPENING:], np.array([token]))
    assert any(same(session.copy_stream(stream), expected) for stream in (0, 1))


def test_the_first_one_too_is_fed_in_two_parts(bundle: Path, session: Session) -> None:
    scheduler = Scheduler(session, prefixes=store_of(session))
    ask(scheduler, "first", prompt(1))
    begun = fed(bundle, prompt(1)[:OPENING], prompt(1)[OPENING:])
    expected = fed(bundle, prompt(1)[:OPENING], prompt(1)[OPENING:], begun.logits.argmax(keepdims=True))
    assert same(session.copy_stream(0), expected)


def test_what_two_prompts_have_in_common_is_kept_for_a_third(session: Session) -> None:
    scheduler = Scheduler(session, prefixes=store_of(session))
    assert [ask(scheduler, f"c{i}", prompt(i), opening=0) for i in range(4)] == [0, 0, OPENING, OPENING]


def test_the_same_prompt_leaves_one_token_to_feed(session: Session) -> None:
    scheduler = Scheduler(session, prefixes=store_of(session))
    ids = prompt(1)
    assert [ask(scheduler, f"c{i}", ids, opening=0) for i in range(3)] == [0, 0, ids.size - 1]


def test_short_openings_are_not_kept(session: Session) -> None:
    store = store_of(session)
    scheduler = Scheduler(session, prefixes=store)
    ids = toy_ids(MIN_PREFIX_TOKENS + 1)
    ask(scheduler, "a", ids[: MIN_PREFIX_TOKENS - 1], opening=MIN_PREFIX_TOKENS - 2)
    ask(scheduler, "b", ids, opening=MIN_PREFIX_TOKENS - 1)
    assert len(store) == 0


def test_nobody_finds_another_owners(session: Session, tmp_path: Path) -> None:
    store = store_of(session, folder=tmp_path)
    scheduler = Scheduler(session, prefixes=store)
    assert ask(scheduler, "a", prompt(1), owner="ada") == 0
    assert ask(scheduler, "b", prompt(2), owner="bob") == 0
    assert ask(scheduler, "c", prompt(3), owner="ada") == OPENING
    assert scheduler.kept_start("eve", prompt(4)) == 0
    assert scheduler.kept_start("bob", prompt(4)) == OPENING


def test_memory_stays_within_its_bounds_and_the_oldest_goes_first(session: Session) -> None:
    one = store_of(session)
    history, copy = IdHistory(), session.copy_stream(0)
    copy = dataclasses.replace(copy, position=MIN_PREFIX_TOKENS)
    history.take(toy_ids(MIN_PREFIX_TOKENS, seed=0))
    one.keep("", history, copy)
    size = one.num_bytes
    store = store_of(session, max_bytes=3 * size)
    for seed in range(6):
        history = IdHistory()
        history.take(toy_ids(MIN_PREFIX_TOKENS, seed=seed))
        store.keep("", history, copy)
        store.keep("", history, copy)  # once is enough
        assert store.num_bytes == min(seed + 1, 3) * size
        if seed >= 2:
            assert store.find("", np.append(toy_ids(MIN_PREFIX_TOKENS, seed=1 if seed == 2 else seed), 0)) is not None
    found = [s for s in range(6) if store.longest("", np.append(toy_ids(MIN_PREFIX_TOKENS, seed=s), 0))]
    assert found == [3, 4, 5]
    none = store_of(session, max_bytes=size - 1)
    none.keep("", history, copy)
    assert (len(none), none.num_bytes) == (0, 0)


def test_few_tokens_of_a_wide_window_take_little(session: Session) -> None:
    scheduler = Scheduler(session, prefixes=(store := store_of(session)))
    ask(scheduler, "a", prompt(1))
    whole = session.copy_stream(0)
    kept = store.find("", prompt(2))
    assert kept is not None
    assert kept.copy.nbytes <= whole.nbytes
    if session.capacity > OPENING:
        assert kept.copy.nbytes < whole.nbytes / 2


def test_files_stay_within_their_bounds(session: Session, tmp_path: Path) -> None:
    copy = dataclasses.replace(session.copy_stream(0), position=0)
    save_stream(tmp_path / "x", session.manifest, copy)
    size = (tmp_path / "x").stat().st_size
    folder = PrefixFolder(tmp_path / "kept", session.manifest, 3 * size)
    for i in range(5):
        folder.keep("", bytes([i]) * 16, copy)
        folder.close()
        os.utime(next((tmp_path / "kept").glob(f"*/*{bytes([i]).hex() * 16}*")), (i, i))
        folder = PrefixFolder(tmp_path / "kept", session.manifest, 3 * size)
    assert [folder.has("", bytes([i]) * 16, 0) for i in range(5)] == [False, False, True, True, True]
    files = list((tmp_path / "kept").glob("*/*"))
    assert sum(file.stat().st_size for file in files) <= 3 * size
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "position"])
def test_a_damaged_file_is_dropped_and_the_prompt_fed(session: Session, tmp_path: Path, damage: str) -> None:
    store = store_of(session, folder=tmp_path)
    ask(Scheduler(session, prefixes=store), "a", prompt(1))
    store.close()
    (file,) = tmp_path.glob("*/*.safetensors")
    raw = file.read_bytes()
    changed = {
        "cut": raw[: len(raw) // 2],
        "empty": b"",
        "other": raw.replace(session.manifest.fingerprint.encode(), b"0" * 64),
    }
    if damage == "position":
        copy, _ = read_stream(file, session.manifest)
        save_stream(file, session.manifest, dataclasses.replace(copy, position=copy.position + 1))
    else:
        file.write_bytes(changed[damage])
    store = store_of(session, folder=tmp_path)
    assert ask(Scheduler(session, prefixes=store), "b", prompt(2)) == 0
    store.close()
    (file,) = tmp_path.glob("*/*.safetensors")  # written anew
    assert read_stream(file, session.manifest)[0].position == OPENING


def test_a_stream_file_of_another_geometry_is_refused(session: Session, tmp_path: Path) -> None:
    file = tmp_path / "one"
    session.prefill(toy_ids(12), streams=[1])
    copy = session.copy_stream(1)
    save_stream(file, session.manifest, copy)
    assert same(read_stream(file, session.manifest)[0], copy)
    name = next(iter(copy.states))
    for states in ({**copy.states, name: copy.states[name][:, :, :-1]}, {**copy.states, "more": copy.states[name]}):
        save_stream(file, session.manifest, dataclasses.replace(copy, states=states))
        with pytest.raises(StateError, match="expected a whole one of this bundle"):
            read_stream(file, session.manifest)
    save_stream(file, session.manifest, dataclasses.replace(copy, position=-1))
    with pytest.raises(StateError, match="position"):
        read_stream(file, session.manifest)


def test_a_shortened_copy_of_another_bundle_is_refused(session: Session) -> None:
    scheduler = Scheduler(session, prefixes=(store := store_of(session)))
    ask(scheduler, "a", prompt(1))
    kept = store.find("", prompt(2))
    assert kept is not None
    name = next(iter(kept.copy.states))
    states = {**kept.copy.states, name: kept.copy.states[name][:, :, :-1]}
    with pytest.raises(UsageError, match="a copy from another bundle"):
        session.place_stream(0, dataclasses.replace(kept.copy, states=states))


def test_a_folder_that_cannot_be_written(session: Session, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="folder for prefixes: received"):
        store_of(session, folder=tmp_path / "file")
    with pytest.raises(UsageError, match="max_bytes: received -1"):
        store_of(session, max_bytes=-1)
    with pytest.raises(UsageError, match="max_bytes: received 0"):
        store_of(session, folder=tmp_path / "new", most=0)


def test_parked_memory_that_is_full_means_feeding(session: Session) -> None:
    scheduler = Scheduler(session, max_parked_bytes=0, prefixes=store_of(session))
    assert [ask(scheduler, name, prompt(i)) for i, name in enumerate("abc")] == [0, 0, 0]
