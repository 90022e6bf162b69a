"""Many conversations on few streams: each hears only itself, whatever the others do and wherever it is put."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from sinkrt import BackendError, Session, UsageError
from sinkrt.answer import AnswerParams
from sinkrt.sampler import SamplingParams
from sinkrt.scheduler import Event, Scheduler

from tests.runtime.toy import VOCAB_SIZE, Toy, build_toy

MANY, ONE = Toy(batch=3, chunk_size=4), Toy(batch=1, chunk_size=4)
SAMPLING = [SamplingParams(), SamplingParams(temperature=0.8, seed=5), SamplingParams(repetition_penalty=1.3)]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("scheduler")
    return build_toy(folder / "many", MANY), build_toy(folder / "one", ONE)


@pytest.fixture
def session(bundles: tuple[Path, Path]) -> Iterator[Session]:
    with Session.load(bundles[0], threads=1) as session:
        yield session


@dataclasses.dataclass
class Said:
    """What a conversation's answers were, one text a request, and how each ended."""

    texts: list[str]
    reasons: list[str]


def collect(events: list[Event], said: dict[str, Said]) -> None:
    for event in events:
        entry = said[event.conversation]
        entry.texts[-1] += event.text
        if event.finish_reason:
            entry.reasons.append(event.finish_reason)


def alone(bundle: Path, prompts: list[list[int]], sampling: SamplingParams, params: AnswerParams) -> list[str]:
    """The same requests, one after the other, in a session of their own."""
    options = dataclasses.asdict(sampling)
    with Session.load(bundle, threads=1) as session:
        return [
            "".join(session.generate(prompt, max_tokens=params.max_tokens, ignore_eos=params.ignore_eos, **options))
            for prompt in prompts
        ]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("slice_tokens", [5, 1000])
def test_each_of_seven_on_three_streams_hears_only_itself(
    bundles: tuple[Path, Path], session: Session, seed: int, slice_tokens: int
) -> None:
    random = np.random.default_rng(seed)
    scheduler = Scheduler(session, max_conversations=7, slice_tokens=slice_tokens)
    params = AnswerParams(max_tokens=23, ignore_eos=True)
    plans = {
        f"c{i}": [random.integers(0, 256, random.integers(1, 40)).tolist() for _ in range(random.integers(1, 4))]
        for i in range(7)
    }
    sampling = {name: SAMPLING[i % len(SAMPLING)] for i, name in enumerate(plans)}
    said: dict[str, Said] = collections.defaultdict(lambda: Said([], []))
    places = set()
    while any(len(said[name].reasons) < len(plan) for name, plan in plans.items()):
        for name, plan in plans.items():
            entry = said[name]
            if len(entry.texts) == len(entry.reasons) < len(plan) and random.random() < 0.2:
                scheduler.submit(name, plan[len(entry.texts)], sampling[name], params)
                entry.texts.append("")
        collect(scheduler.step(), said)
        load = scheduler.load
        assert load.running <= 3
        assert load.conversations <= 7
        places.add(load.parked)
    assert not scheduler.has_work
    assert scheduler.step() == []
    for name, plan in plans.items():
        assert said[name].texts == alone(bundles[1], plan, sampling[name], params), name
        assert said[name].reasons == ["length"] * len(plan)
        # The last token of each answer is fed too.
        assert scheduler.position(name) == sum(map(len, plan)) + 23 * len(plan)
    assert max(places) >= 3, "some were parked"


def test_a_long_prompt_does_not_hold_up_answers(session: Session) -> None:
    scheduler = Scheduler(session)
    scheduler.submit("talker", [1], SamplingParams(), AnswerParams(max_tokens=1000, ignore_eos=True))
    scheduler.step()
    before = scheduler.position("talker")
    scheduler.submit("reader", [2] * 400, SamplingParams(), AnswerParams(max_tokens=1))
    for _ in range(100):
        scheduler.step()
    assert scheduler.position("talker") - before == 50, "every other run is a step"
    assert scheduler.position("reader") == 50 * 4


def test_streams_are_shared_fairly(session: Session) -> None:
    scheduler = Scheduler(session, slice_tokens=10)
    names = [f"c{i}" for i in range(9)]
    for name in names:
        scheduler.submit(name, [1, 2], SamplingParams(), AnswerParams(ignore_eos=True))
    for _ in range(600):
        scheduler.step()
    positions = [scheduler.position(name) for name in names]
    assert max(positions) - min(positions) <= 2 * 10
    assert min(positions) >= 600 * 3 // 9 - 20


def test_a_cancelled_conversation_can_go_on(bundles: tuple[Path, Path], session: Session) -> None:
    scheduler = Scheduler(session)
    scheduler.submit("a", [5, 6, 7], SamplingParams(), AnswerParams(ignore_eos=True))
    for _ in range(20):
        scheduler.step()
    event = scheduler.cancel("a")
    assert event is not None
    assert event.finish_reason == "cancelled"
    assert (event.prompt_tokens, event.answer_tokens) == (3, scheduler.position("a") - 3)
    assert not scheduler.has_work
    assert scheduler.cancel("a") is None
    count = scheduler.position("a") - 3
    said = {"a": Said([""], [])}
    scheduler.submit("a", [9], SamplingParams(), AnswerParams(max_tokens=10, ignore_eos=True))
    while scheduler.has_work:
        collect(scheduler.step(), said)
    with Session.load(bundles[1], threads=1) as single:
        for _ in single.generate([5, 6, 7], max_tokens=count, ignore_eos=True):
            pass
        assert said["a"].texts == ["".join(single.generate([9], max_tokens=10, ignore_eos=True))]


def test_cancel_while_waiting_and_while_parked(session: Session) -> None:
    scheduler = Scheduler(session, slice_tokens=2)
    for i in range(6):
        scheduler.submit(f"c{i}", [1] * 9, SamplingParams(), AnswerParams(ignore_eos=True))
    scheduler.cancel("c5")
    for _ in range(30):
        scheduler.step()
    for i in range(5):
        scheduler.cancel(f"c{i}")
    assert not scheduler.has_work
    assert scheduler.load.waiting == 0
    assert scheduler.position("c5") == 0


def test_the_least_recently_active_is_forgotten(session: Session) -> None:
    scheduler = Scheduler(session, max_conversations=3)
    for name in ("a", "b", "c", "a", "d"):
        scheduler.submit(name, [1], SamplingParams(), AnswerParams(max_tokens=2))
        while scheduler.has_work:
            scheduler.step()
    assert "b" not in scheduler
    assert all(name in scheduler for name in "acd")
    with pytest.raises(UsageError, match="'b'"):
        scheduler.position("b")


def test_stop_texts_and_the_end_of_a_text_end_answers(bundles: tuple[Path, Path], session: Session) -> None:
    whole = alone(bundles[1], [[1, 2]], SamplingParams(), AnswerParams(max_tokens=60, ignore_eos=True))[0]
    scheduler, said = Scheduler(session), {"a": Said([""], [])}
    scheduler.submit("a", [1, 2], SamplingParams(), AnswerParams(stop=(whole[9:12],), ignore_eos=True))
    while scheduler.has_work:
        collect(scheduler.step(), said)
    assert said["a"].texts == [whole[: whole.index(whole[9:12])]]
    assert said["a"].reasons == ["stop"]


@pytest.mark.parametrize("in_chunk", [True, False])
def test_a_failure_ends_its_conversation_and_no_other(
    bundles: tuple[Path, Path], session: Session, monkeypatch: pytest.MonkeyPatch, in_chunk: bool
) -> None:
    scheduler = Scheduler(session)
    params = AnswerParams(max_tokens=12, ignore_eos=True)
    said = {name: Said([""], []) for name in "ab"}
    scheduler.submit("a", [1, 2, 3], SamplingParams(), params)
    if in_chunk:
        collect(scheduler.step(), said)
    scheduler.submit("b", [4] * 20, SamplingParams(), params)
    if in_chunk:
        real: Any = session.prefill

        def prefill(*arguments: Any, **options: Any) -> Any:
            raise BackendError("no memory")

        monkeypatch.setattr(session, "prefill", prefill)
        while "b" in scheduler:
            collect(scheduler.step(), said)
        monkeypatch.setattr(session, "prefill", real)
    else:
        for _ in range(12):
            collect(scheduler.step(), said)
        session.logits[1] = np.nan  # as an overflow in half precision would leave it
    errors = []
    while scheduler.has_work:
        events = scheduler.step()
        errors += [event.error for event in events if event.error]
        collect(events, said)
    assert said["b"].reasons == ["error"]
    assert "b" not in scheduler
    assert in_chunk or "logits" in errors[0]
    assert said["a"].texts == alone(bundles[1], [[1, 2, 3]], SamplingParams(), params)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: s.submit("a", [], SamplingParams(), AnswerParams()), "prompt"),
        (lambda s: s.submit("a", [[1]], SamplingParams(), AnswerParams()), "prompt"),
        (lambda s: s.submit("a", [0.5], SamplingParams(), AnswerParams()), "prompt"),
        (lambda s: s.submit("a", [VOCAB_SIZE], SamplingParams(), AnswerParams()), "token id"),
        (lambda s: s.submit("a", [-1], SamplingParams(), AnswerParams()), "token id"),
        (lambda s: s.cancel("nobody"), "'nobody'"),
        (lambda s: s.forget("nobody"), "'nobody'"),
        (lambda s: [s.submit("a", [1], SamplingParams(), AnswerParams()) for _ in range(2)], "at work"),
        (lambda s: [s.submit(n, [1], SamplingParams(), AnswerParams()) for n in "abcde"], "4 at work"),
        (lambda s: Scheduler(s._session, max_conversations=0), "max_conversations"),
        (lambda s: Scheduler(s._session, slice_tokens=0), "slice_tokens"),
    ],
)
def test_what_callers_get_wrong_is_one_line(session: Session, call: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        call(Scheduler(session, max_conversations=4))
    assert "\n" not in str(caught.value)


def test_memory_stays_flat_over_many_conversations(session: Session) -> None:
    scheduler, process = Scheduler(session, max_conversations=5, slice_tokens=7), psutil.Process()

    def talk(rounds: int) -> int:
        before = process.memory_info().rss
        for i in range(rounds):
            scheduler.submit(f"c{i % 11}-{i}", [i % 256] * 5, SamplingParams(), AnswerParams(max_tokens=6))
            while scheduler.load.running + scheduler.load.waiting > 3:
                scheduler.step()
        while scheduler.has_work:
            scheduler.step()
        return process.memory_info().rss - before

    talk(300)
    assert talk(1500) <= 512 * 1024
    assert scheduler.load.conversations <= 5
