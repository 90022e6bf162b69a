"""Conversations that survive their process: the same bits from the last save on, and files within bounds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from sinkrt import Session, UsageError
from sinkrt.answer import AnswerParams
from sinkrt.conversation_folder import MAX_WAITING, ConversationFolder
from sinkrt.prefix_store import open_prefix_store
from sinkrt.sampler import SamplingParams
from sinkrt.scheduler import Scheduler
from sinkrt.stream_folder import StreamFolder

from tests.runtime.faults import load_faulty
from tests.runtime.toy import Toy, build_toy, toy_ids

MIB = 2**20
WIDE, NARROW = Toy(batch=2, chunk_size=8, window_size=200), Toy(batch=2, chunk_size=8, window_size=12)


@pytest.fixture(scope="module", params=[WIDE, NARROW], ids=["before-the-wrap", "after-wraps"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy(tmp_path_factory.mktemp("durable") / "toy", request.param)


@pytest.fixture
def session(bundle: Path) -> Iterator[Session]:
    with Session.load(bundle, threads=1) as session:
        yield session


def scheduler_of(session: Session, root: Path, **options: int) -> Scheduler:
    return Scheduler(session, folder=ConversationFolder(root, session.manifest, MIB), **options)


def say(scheduler: Scheduler, name: str, ids: np.ndarray, tokens: int = 5, steps: int | None = None) -> str:
    """Get an answer, or as much of it as some steps give."""
    params = AnswerParams(max_tokens=tokens, ignore_eos=True)
    scheduler.submit(name, ids, SamplingParams(temperature=0.7, seed=3), params, lasting=True)
    text = ""
    while scheduler.has_work and steps != 0:
        text += "".join(event.text for event in scheduler.step() if event.conversation == name)
        steps = None if steps is None else steps - 1
    return text


def settled(scheduler: Scheduler) -> None:
    """Wait until what was saved is on the disk, and save nothing more: as if the process had been killed then."""
    scheduler.close(save=False)


@pytest.mark.parametrize("turns", [1, 3])
def test_a_conversation_goes_on_after_its_process_has_ended(
    bundle: Path, session: Session, tmp_path: Path, turns: int
) -> None:
    asked = [toy_ids(20 + i, seed=i) for i in range(turns + 1)]
    first = scheduler_of(session, tmp_path)
    for ids in asked[:-1]:
        say(first, "ada", ids)
    settled(first)
    with Session.load(bundle, threads=1) as fresh:
        alone = Scheduler(fresh)
        for ids in asked[:-1]:
            say(alone, "ada", ids)
        expected = say(alone, "ada", asked[-1], 30)
        position = alone.position("ada")
    with Session.load(bundle, threads=1) as fresh:
        again = scheduler_of(fresh, tmp_path)
        assert "ada" not in again
        assert again.recall("ada")
        assert not again.recall("bob")
        assert say(again, "ada", asked[-1], 30) == expected
        assert again.position("ada") == position
        settled(again)


def test_one_that_is_cut_short_goes_on_from_the_last_save(bundle: Path, session: Session, tmp_path: Path) -> None:
    first = scheduler_of(session, tmp_path, save_every=10)
    say(first, "ada", toy_ids(4), tokens=1000, steps=48)
    taken = first.position("ada")
    settled(first)
    with Session.load(bundle, threads=1) as fresh:
        again = scheduler_of(fresh, tmp_path)
        assert again.recall("ada")
        saved = again.position("ada")
        assert taken - 10 < saved <= taken
        ids = session.recent_ids(0)[: session.capacity]
        say(again, "ada", toy_ids(3, seed=5), tokens=1)
        recent = fresh.recent_ids(0)
        lag = taken - saved
        kept = ids[: ids.size - lag][-6:].tolist()
        assert recent[: recent.size - 4][-6:].tolist() == kept, "the tokens up to the save, and nothing after it"
        settled(again)


def test_the_rest_of_a_prompt_is_saved_too(bundle: Path, session: Session, tmp_path: Path) -> None:
    ids = toy_ids(40)
    first = scheduler_of(session, tmp_path)
    say(first, "ada", ids, steps=2)
    first.cancel("ada", keep_prompt=True)
    fed = first.position("ada")
    assert 0 < fed < ids.size
    settled(first)
    with Session.load(bundle, threads=1) as fresh:
        again = scheduler_of(fresh, tmp_path)
        assert again.recall("ada")
        assert (again.position("ada"), again.num_pending("ada")) == (fed, ids.size - fed)
        text = say(again, "ada", toy_ids(3, seed=9))
        settled(again)
    with Session.load(bundle, threads=1) as fresh:
        alone = Scheduler(fresh)
        say(alone, "ada", ids[:fed], steps=2)
        alone.cancel("ada")
        assert alone.position("ada") == fed
        assert say(alone, "ada", np.concatenate([ids[fed:], toy_ids(3, seed=9)])) == text


def test_closing_saves_what_is_at_work(session: Session, tmp_path: Path) -> None:
    first = scheduler_of(session, tmp_path)
    say(first, "ada", toy_ids(9), tokens=1000, steps=30)
    position = first.position("ada")
    first.close()
    again = scheduler_of(session, tmp_path)
    assert again.recall("ada")
    assert again.position("ada") == position
    settled(again)


def test_more_conversations_than_are_remembered(session: Session, tmp_path: Path) -> None:
    scheduler = scheduler_of(session, tmp_path, max_conversations=2)
    for i in range(5):
        assert not scheduler.recall(f"c{i}")
        say(scheduler, f"c{i}", toy_ids(7 + i))
    assert scheduler.load.conversations == 2
    for i in range(5):
        assert scheduler.recall(f"c{i}")
        assert scheduler.position(f"c{i}") == 7 + i + 5
    assert scheduler.load.conversations == 2
    settled(scheduler)


def test_only_lasting_ones_are_saved_and_deleted_ones_are_gone(session: Session, tmp_path: Path) -> None:
    scheduler = scheduler_of(session, tmp_path)
    params = AnswerParams(max_tokens=2, ignore_eos=True)
    scheduler.submit("plain", toy_ids(5), SamplingParams(), params)
    say(scheduler, "ada", toy_ids(5))
    say(scheduler, "bob", toy_ids(5))
    scheduler.delete("ada")
    scheduler.delete("unknown")
    settled(scheduler)
    again = scheduler_of(session, tmp_path)
    assert [again.recall(name) for name in ("plain", "ada", "bob")] == [False, False, True]
    settled(again)


def test_files_stay_within_their_bounds(session: Session, tmp_path: Path) -> None:
    first = scheduler_of(session, tmp_path)
    say(first, "c0", toy_ids(30))
    settled(first)
    (file,) = tmp_path.glob("*/*.safetensors")
    size = file.stat().st_size
    for i in range(1, 6):
        scheduler = Scheduler(session, folder=ConversationFolder(tmp_path, session.manifest, 3 * size))
        say(scheduler, f"c{i}", toy_ids(30))
        settled(scheduler)
        time.sleep(0.01)  # ages differ
        assert sum(file.stat().st_size for file in tmp_path.glob("*/*.safetensors")) <= 3 * size
    again = Scheduler(session, folder=ConversationFolder(tmp_path, session.manifest, 3 * size))
    assert again.recall("c5")
    assert not again.recall("c0")
    settled(again)


def test_no_memory_to_park_one_more(session: Session, tmp_path: Path) -> None:
    first = scheduler_of(session, tmp_path)
    say(first, "ada", toy_ids(5))
    settled(first)
    again = scheduler_of(session, tmp_path, max_parked_bytes=0)
    with pytest.raises(UsageError, match="parked conversations: received no memory for one more"):
        again.recall("ada")
    settled(again)


def test_a_damaged_file_is_dropped(session: Session, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = scheduler_of(session, tmp_path)
    say(first, "ada", toy_ids(5))
    settled(first)
    (file,) = tmp_path.glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    again = scheduler_of(session, tmp_path)
    assert not again.recall("ada")
    assert "conversations: stream file: received" in caplog.text
    assert not list(tmp_path.glob("*/*.safetensors"))
    settled(again)


def test_many_threads_save_read_and_remove(session: Session, tmp_path: Path) -> None:
    """The newest state wins, reading waits for what is being written, and nothing is left waiting."""
    folder = ConversationFolder(tmp_path, session.manifest, 64 * MIB)
    session.prefill(toy_ids(9), streams=[0])
    copy = session.copy_stream(0)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(30):
                folder.save(f"c{number}", copy, np.array([turn], np.int64))
                found = folder.read(f"c{number}")
                assert found is not None
                assert found[1].tolist() == [turn]
            folder.remove(f"c{number}")
            assert f"c{number}" not in folder
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2 * MAX_WAITING)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    folder.close()
    assert not errors
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_a_conversation_that_is_too_large_takes_no_others_along(session: Session, tmp_path: Path) -> None:
    first = scheduler_of(session, tmp_path)
    say(first, "ada", toy_ids(5))
    settled(first)
    (file,) = tmp_path.glob("*/*.safetensors")
    folder = ConversationFolder(tmp_path, session.manifest, file.stat().st_size // 4)
    second = Scheduler(session, folder=folder)
    say(second, "bob", toy_ids(5))
    settled(second)
    assert list(tmp_path.glob("*/*.safetensors")) == [file]


def test_what_could_not_be_written_is_written_the_next_time(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = scheduler_of(session, tmp_path)
    for failing in (mock.Mock(return_value=False), mock.Mock(side_effect=MemoryError)):
        with monkeypatch.context() as patch:
            patch.setattr(StreamFolder, "write", failing)
            say(scheduler, "ada", toy_ids(5))
            scheduler._keeper._folder.read("ada")  # waits for the writer
            assert scheduler._keeper._folder.has_failed("ada")
    scheduler.close()
    again = scheduler_of(session, tmp_path)
    assert again.recall("ada")
    assert again.position("ada") == 20
    settled(again)


def test_another_process_is_kept_out(session: Session, tmp_path: Path) -> None:
    first = ConversationFolder(tmp_path, session.manifest, MIB)
    with pytest.raises(UsageError, match="which another process uses"):
        ConversationFolder(tmp_path, session.manifest, MIB)
    first.close()
    ConversationFolder(tmp_path, session.manifest, MIB).close()


@pytest.mark.parametrize("name", ["ada", "bob"])
def test_numbers_that_are_none_are_neither_saved_nor_shared(bundle: Path, tmp_path: Path, name: str) -> None:
    """What overflows fails alone: others go on, and the conversation from its last save."""
    session, backend = load_faulty(bundle)
    with session:
        store = open_prefix_store(session.manifest, MIB, tmp_path / "prefixes", MIB)
        folder = ConversationFolder(tmp_path / "saved", session.manifest, MIB)
        scheduler = Scheduler(session, prefixes=store, folder=folder, save_every=4)
        say(scheduler, "ada", toy_ids(9))
        position = scheduler.position("ada")

        def overflow(stream: int, ids: np.ndarray, at: int) -> None:
            backend.real.run_chunk(stream, ids, at)
            backend.real.logits[stream] = np.nan

        backend.run_chunk = overflow
        params = AnswerParams(max_tokens=3, ignore_eos=True)
        scheduler.submit(name, toy_ids(90, seed=2), SamplingParams(), params, lasting=True, opening=80)
        events = []
        while scheduler.has_work:
            events += scheduler.step()
        assert [event.finish_reason for event in events if event.finish_reason] == ["error"]
        del backend.run_chunk
        assert len(store) == 0
        assert scheduler.recall("ada")
        assert scheduler.position("ada") == position
        say(scheduler, "ada", toy_ids(3))
        settled(scheduler)
