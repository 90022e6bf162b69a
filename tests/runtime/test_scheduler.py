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
from sinkrt.answer import Answer, AnswerParams
from sinkrt.sampler import SamplingParams
from sinkrt.scheduler import Event, Scheduler
from sinkrt.stream_slots import stream_bytes

from tests.runtime.faults import load_faulty
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
    ],
)
def test_what_callers_get_wrong_is_one_line(session: Session, call: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        call(Scheduler(session, max_conversations=4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["max_conversations", "slice_tokens"])
def test_an_option_out_of_range_is_one_line(session: Session, option: str) -> None:
    with pytest.raises(UsageError, match=option) as caught:
        Scheduler(session, **{option: 0})
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


def run_out(scheduler: Scheduler) -> str:
    """The text of everything that is at work."""
    text = ""
    while scheduler.has_work:
        text += "".join(event.text for event in scheduler.step())
    return text


def test_only_the_one_that_cannot_take_its_token_fails(
    bundles: tuple[Path, Path], session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of three that fails is one step each: nobody pays for a neighbour."""
    scheduler, real = Scheduler(session), session.step
    params = AnswerParams(max_tokens=12, ignore_eos=True)
    said = {name: Said([""], []) for name in "abc"}

    def step(ids: Any, streams: Any = None) -> Any:
        if 1 in streams and scheduler.position("b") >= 5:
            raise BackendError("out of memory")
        return real(ids, streams)

    monkeypatch.setattr(session, "step", step)
    for i, name in enumerate("abc"):
        scheduler.submit(name, [i + 1], SamplingParams(), params)
    errors = []
    while scheduler.has_work:
        events = scheduler.step()
        errors += [(event.conversation, event.error) for event in events if event.error]
        collect(events, said)
    assert errors == [("b", "out of memory")]
    assert "b" not in scheduler
    for i, name in ((0, "a"), (2, "c")):
        assert said[name].texts == alone(bundles[1], [[i + 1]], SamplingParams(), params)


def test_a_chunk_of_no_numbers_fails_alone(bundles: tuple[Path, Path]) -> None:
    """A chunk that overflows leaves NaN and no error; its stream is lost, and a rest of one token is still to feed."""
    session, backend = load_faulty(bundles[0])
    scheduler, params = Scheduler(session), AnswerParams(max_tokens=12, ignore_eos=True)

    def run_chunk(stream: int, ids: np.ndarray, position: int) -> None:
        backend.real.run_chunk(stream, ids, position)
        if 99 in ids:
            backend.logits[stream] = np.nan

    backend.run_chunk = run_chunk
    said = {name: Said([""], []) for name in "ab"}
    scheduler.submit("a", [3, 4], SamplingParams(), params)
    scheduler.submit("b", [99] * 5, SamplingParams(), params)
    while scheduler.has_work:
        collect(scheduler.step(), said)
    assert said["b"].reasons == ["error"]
    assert said["a"].texts == alone(bundles[1], [[3, 4]], SamplingParams(), params)
    scheduler.submit("b", [7], SamplingParams(), params)
    assert run_out(scheduler) == alone(bundles[1], [[7]], SamplingParams(), params)[0], "its stream is whole again"


def test_a_conversation_is_found_by_what_it_has_taken(bundles: tuple[Path, Path], session: Session) -> None:
    scheduler, params = Scheduler(session), AnswerParams(max_tokens=5, ignore_eos=True)
    scheduler.submit("a", [1, 2, 3], SamplingParams(), params)
    scheduler.submit("kept", [4, 5], SamplingParams(), params, lasting=True)
    assert scheduler.find_start([1, 2, 3]) is None, "it is at work"
    run_out(scheduler)
    taken = {name: session.recent_ids(stream)[-5:].tolist() for stream, name in enumerate(("a", "kept"))}
    whole = [1, 2, 3, *taken["a"]]
    assert scheduler.position("a") == len(whole)
    assert scheduler.find_start([*whole, 77, 78]) == "a"
    assert scheduler.find_start(whole) == "a"
    assert scheduler.find_start(whole[:-1]) is None
    assert scheduler.find_start([9, *whole[1:]]) is None
    assert scheduler.find_start([*whole[:5], (whole[5] + 1) % 256, *whole[6:], 77]) is None
    assert scheduler.find_start([4, 5, *taken["kept"]]) is None, "lasting ones belong to their names"
    # The longest start wins, and going on gives what a new stream would say.
    scheduler.submit("longer", [*whole, 77], SamplingParams(), AnswerParams(max_tokens=1, ignore_eos=True))
    run_out(scheduler)
    (last,) = (session.recent_ids(s)[-1] for s in range(3) if session.position[s] == len(whole) + 2)
    assert scheduler.find_start([*whole, 77, int(last), 78]) == "longer"
    scheduler.submit("a", [77, 78, 79], SamplingParams(), params)
    assert run_out(scheduler) == alone(bundles[1], [[*whole, 77, 78, 79]], SamplingParams(), params)[0]


def test_nothing_more_to_feed_goes_on_where_it_stood(bundles: tuple[Path, Path], session: Session) -> None:
    scheduler = Scheduler(session)
    scheduler.submit("a", [1, 2], SamplingParams(), AnswerParams(max_tokens=5, ignore_eos=True))
    text = run_out(scheduler)
    scheduler.submit("a", [], SamplingParams(), AnswerParams(max_tokens=5, ignore_eos=True))
    text += run_out(scheduler)
    with Session.load(bundles[1], threads=1) as single:
        single.prefill([1, 2])
        ids = []
        for _ in range(10):
            ids.append(int(single.logits[0].argmax()))
            single.step(ids[-1:])
        assert text.count("\N{REPLACEMENT CHARACTER}") or text == single.tokenizer.decode(ids)
        assert scheduler.position("a") == 12
        assert session.recent_ids(0).tolist() == single.recent_ids(0).tolist()


def test_what_was_left_of_a_prompt_is_taken_with_the_next(bundles: tuple[Path, Path], session: Session) -> None:
    params = AnswerParams(max_tokens=8, ignore_eos=True)
    for keep in (True, False):
        scheduler = Scheduler(session)
        prompt, nxt = list(range(50, 90)), [7, 8, 9]
        scheduler.submit("a", prompt, SamplingParams(), params)
        for _ in range(3):
            scheduler.step()
        scheduler.cancel("a", keep_prompt=keep)
        assert scheduler.position("a") == 12
        assert scheduler.num_pending("a") == (28 if keep else 0)
        assert not scheduler.has_work
        scheduler.submit("a", nxt, SamplingParams(), params)
        fed = prompt + nxt if keep else prompt[:12] + nxt
        assert run_out(scheduler) == alone(bundles[1], [fed], SamplingParams(), params)[0]


def test_a_paused_conversation_costs_nobody_a_stream(bundles: tuple[Path, Path], session: Session) -> None:
    scheduler, params = Scheduler(session), AnswerParams(max_tokens=40, ignore_eos=True)
    said: dict[str, Said] = {name: Said([""], []) for name in "abcd"}
    for i, name in enumerate("abc"):
        scheduler.submit(name, [i], SamplingParams(), params)
    for _ in range(10):
        collect(scheduler.step(), said)
    for name in "abc":
        scheduler.pause(name)
    assert not scheduler.has_work
    assert scheduler.step() == []
    scheduler.submit("d", [3], SamplingParams(), params)
    while scheduler.has_work:
        collect(scheduler.step(), said)
    assert said["d"].reasons == ["length"]
    assert [said[name].reasons for name in "abc"] == [[], [], []]
    assert scheduler.load.parked == 1, "one of the paused ones gave its stream away"
    for name in "abc":
        scheduler.resume(name)
    while scheduler.has_work:
        collect(scheduler.step(), said)
    for i, name in enumerate("abcd"):
        assert said[name].texts == alone(bundles[1], [[i]], SamplingParams(), params), name


@pytest.mark.parametrize("room", [0, 1, 2])
def test_parked_streams_have_their_memory_and_no_more(bundles: tuple[Path, Path], session: Session, room: int) -> None:
    """Without memory to park, those at work wait for a stream, and idle ones are forgotten, lasting ones last."""
    scheduler = Scheduler(session, slice_tokens=4, max_parked_bytes=room * stream_bytes(session))
    params = AnswerParams(max_tokens=30, ignore_eos=True)
    said: dict[str, Said] = {}
    for i in range(6):
        said[f"c{i}"] = Said([""], [])
        scheduler.submit(f"c{i}", [i, 5], SamplingParams(), params, lasting=i == 0)
    while scheduler.has_work:
        collect(scheduler.step(), said)
        assert scheduler.load.parked <= room
    for i in range(6):
        assert said[f"c{i}"].texts == alone(bundles[1], [[i, 5]], SamplingParams(), params)
    assert ("c0" in scheduler) == bool(room), "work goes before memories"
    assert scheduler.load.conversations == 3 + room
    copy = session.copy_stream(0)
    assert stream_bytes(session) == copy.nbytes


def test_the_first_event_of_a_request_shows_that_it_has_a_stream(session: Session) -> None:
    scheduler = Scheduler(session, slice_tokens=1000)
    for i in range(4):
        scheduler.submit(f"c{i}", [1], SamplingParams(), AnswerParams(max_tokens=3, ignore_eos=True))
    first = scheduler.step()
    assert [(event.conversation, event.text, event.answer_tokens) for event in first[:3]] == [
        (f"c{i}", "", 0) for i in range(3)
    ]
    later = [event for _ in range(8) for event in scheduler.step() if event.conversation == "c3"]
    assert (later[0].text, later[0].finish_reason, later[0].answer_tokens) == ("", None, 0)
    assert later[-1].finish_reason == "length"
    assert (scheduler.prompt_tokens, scheduler.answer_tokens) == (4, 12)


class _Once:
    """A method that fails at one call and works at all others."""

    def __init__(self, real: Any, call: int, error: Exception) -> None:
        self._real, self._left, self._error = real, call, error

    def __call__(self, *arguments: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            raise self._error
        return self._real(*arguments)


def break_next_answer(monkeypatch: pytest.MonkeyPatch, method: str, call: int, error: Exception) -> None:
    """Let one call of a method of the answer that is made next fail."""

    made: list[Answer] = []
    initialise, real = Answer.__init__, getattr(Answer, method)
    once = _Once(real, call, error)

    def remember(self: Answer, *arguments: Any) -> None:
        initialise(self, *arguments)
        made.append(self)

    monkeypatch.setattr(Answer, "__init__", remember)
    monkeypatch.setattr(Answer, method, lambda self, *arguments: (once if self is made[0] else real)(self, *arguments))


@pytest.mark.parametrize(
    "error", [UsageError("repetition_penalty: too small"), FloatingPointError("a\nbug"), MemoryError()]
)
@pytest.mark.parametrize("method", ["pick", "push", "flush"])
@pytest.mark.parametrize("call", [1, 3])
def test_an_error_of_sampling_or_decoding_keeps_the_conversation(
    bundles: tuple[Path, Path],
    session: Session,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    method: str,
    call: int,
) -> None:
    """Its answer ends; what its stream has taken stays, the next request goes on there, and no other is disturbed."""
    scheduler = Scheduler(session)
    params = AnswerParams(max_tokens=6, ignore_eos=True)
    first, other, more = [1, 2, 3, 4, 5], [9, 8, 7], [6, 5]
    if method == "flush":
        call = 1
    break_next_answer(monkeypatch, method, call, error)
    scheduler.submit("a", first, SamplingParams(), params, lasting=True)
    scheduler.submit("b", other, SamplingParams(), params)
    said: dict[str, Said] = collections.defaultdict(lambda: Said([""], []))
    errors = []
    while scheduler.has_work:
        events = scheduler.step()
        errors += [event.error for event in events if event.error]
        collect(events, said)
    assert len(errors) == 1
    assert "\n" not in errors[0]
    assert (said["a"].reasons, said["b"].reasons) == (["error"], ["length"])
    taken = {"pick": len(first) + call - 1, "push": len(first) + call, "flush": len(first) + 6}[method]
    assert ("a" in scheduler, scheduler.position("a"), scheduler.is_at_work("a")) == (True, taken, False)
    scheduler.submit("a", more, SamplingParams(), params, lasting=True)
    said["a"].texts.append("")
    while scheduler.has_work:
        collect(scheduler.step(), said)
    with Session.load(bundles[1], threads=1) as one:
        list(one.generate(first, max_tokens=6, ignore_eos=True))  # the tokens that were taken, and those after them
        answered = one.recent_ids()[-6:].tolist() if one.capacity >= 6 else []
    prefix = first + answered[: taken - len(first)]
    assert said["a"].texts[-1] == alone(bundles[1], [prefix + more], SamplingParams(), params)[0]
    assert said["b"].texts == alone(bundles[1], [other], SamplingParams(), params)


def test_numbers_that_are_none_still_end_a_conversation(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the model's own logits: its stream is lost."""
    scheduler = Scheduler(session)
    break_next_answer(monkeypatch, "pick", 1, BackendError("logits: nan"))
    scheduler.submit("a", [1, 2], SamplingParams(), AnswerParams(max_tokens=5), lasting=True)
    events = []
    while scheduler.has_work:
        events += scheduler.step()
    assert events[-1].error == "logits: nan"
    assert "a" not in scheduler
