"""Stop sequences, limits, and answers that go on where they were cut short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sinkrt import Session, UsageError
from sinkrt.answer import MAX_STOPS, Answer, AnswerParams, StopMatcher
from sinkrt.sampler import SamplingParams

from tests.runtime.toy import BOS, EOS, VOCAB_SIZE, Toy, build_toy


def cut_at_first(text: str, stops: list[str]) -> str:
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


@given(st.text("ab\n", max_size=40), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.data())
def test_the_matcher_cuts_where_a_search_of_it_all_does(text: str, stops: list[str], data: st.DataObject) -> None:
    matcher, shown, rest = StopMatcher(stops), "", text
    while rest and not matcher.matched:
        size = data.draw(st.integers(1, len(rest)))
        shown += matcher.push(rest[:size])
        rest = rest[size:]
        whole = text[: len(text) - len(rest)]
        assert whole.startswith(shown)
        # Nothing is held back that could be shown: at most the longest stop sequence less one character.
        if not matcher.matched:
            assert len(whole) - len(shown) < max([1, *map(len, stops)])
    shown += matcher.flush()
    # Of two that overlap, the one that is whole first ends the text: pieces cannot show that a longer one would follow.
    assert text.startswith(shown)
    if not any(stop in text for stop in stops):
        assert shown == text
        assert not matcher.matched
    else:
        assert matcher.matched
        assert len(shown) <= min(text.find(s) + len(s) for s in stops if s in text)
        assert any(text.startswith(stop, len(shown)) for stop in stops)


def test_pieces_of_one_character_and_whole_text_agree() -> None:
    text, stops = "one two\n\nUser: three", ["\nUser:", "three"]
    single = StopMatcher(stops)
    shown = "".join(single.push(c) for c in text) + single.flush()
    assert shown == cut_at_first(text, stops) == "one two\n"


def test_generate_stops_before_the_text(session: Session) -> None:
    whole = "".join(session.generate("Hello", max_tokens=60, ignore_eos=True))
    stop = whole[20:24]
    session.reset()
    pieces = list(session.generate("Hello", max_tokens=60, ignore_eos=True, stop=stop))
    assert "".join(pieces) == whole[: whole.index(stop)]
    session.reset()
    assert "".join(session.generate("Hello", max_tokens=60, ignore_eos=True, stop=["no such text", stop])) == "".join(
        pieces
    )


@pytest.mark.parametrize("stop", [[""], ["a"] * (MAX_STOPS + 1), ["x" * 2000]])
def test_stops_that_are_refused(stop: list[str]) -> None:
    with pytest.raises(UsageError, match="stop"):
        AnswerParams(stop=tuple(stop))


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_answer_goes_on_after_save_and_load_with_the_same_tokens(
    session: Session, tmp_path: Path, temperature: float
) -> None:
    def run(prompt: str | None, max_tokens: int) -> None:
        for _ in session.generate(
            prompt, max_tokens=max_tokens, temperature=temperature, seed=7, repetition_penalty=1.1, ignore_eos=True
        ):
            pass

    run("Hello", 90)
    ids, logits = session.recent_ids(), session.logits.copy()
    for first in (1, 17, 40):
        session.reset()
        run("Hello", first)
        session.save_state(tmp_path / "state")
        session.reset()
        session.step([1])
        session.load_state(tmp_path / "state")
        run(None, 90 - first)
        np.testing.assert_array_equal(session.recent_ids(), ids)
        np.testing.assert_array_equal(session.logits, logits)


def test_a_character_that_was_cut_is_completed(session: Session) -> None:
    """The toy's tokens are bytes: the last of a character completes it in a new answer too."""
    ids = list("né".encode())
    session.prefill(ids[:-1])
    answer = Answer(session.tokenizer, (EOS,), 258, SamplingParams(), AnswerParams(), session.recent_ids().tolist())
    assert answer.push(ids[-1]) == "é"


def test_there_is_nothing_to_go_on_with_at_the_start(session: Session) -> None:
    with pytest.raises(UsageError, match="the stream is empty"):
        session.generate(None)


KILLED = """
import sys
from sinkrt import Session
session = Session.load(sys.argv[1], threads=1)
for piece in session.generate("Hello", temperature=0.9, seed=3, ignore_eos=True):
    if int(session.position[0]) % 10 == 0:
        session.save_state(sys.argv[2])
        print(int(session.position[0]), flush=True)
"""


def test_killed_and_resumed_is_as_if_nothing_had_happened(tmp_path: Path) -> None:
    bundle = build_toy(tmp_path / "bundle", Toy(chunk_size=4))
    state = tmp_path / "state"
    command = [sys.executable, "-c", KILLED, str(bundle), str(state)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    process.kill()
    process.wait()
    with Session.load(bundle, threads=1) as session:
        session.load_state(state)
        reached = int(session.position[0])
        assert reached >= 50
        for _ in session.generate(None, temperature=0.9, seed=3, ignore_eos=True, max_tokens=200 - reached):
            pass
        resumed = {name: buffer.copy() for name, buffer in session.buffers.items() if name.startswith(("sink", "win"))}
        logits = session.logits.copy()
        session.reset()
        for _ in session.generate("Hello", temperature=0.9, seed=3, ignore_eos=True, max_tokens=200 - len("Hello")):
            pass
        np.testing.assert_array_equal(session.logits, logits)
        for name, value in resumed.items():
            np.testing.assert_array_equal(session.buffers[name], value)


@pytest.mark.parametrize("value", [0, -1, 1.5, float("nan"), float("inf"), "5"])
def test_a_length_that_is_no_positive_integer_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="max_tokens: received"):
        AnswerParams(max_tokens=value)  # type: ignore[arg-type]
    assert AnswerParams(max_tokens=10**400).max_tokens == 10**400


def test_chosen_special_tokens_are_shown(session: Session) -> None:
    """For whoever takes the answer apart; stop texts find them once."""
    for shown, stop, expected in (
        (frozenset(), (), "ab"),
        (frozenset({"<bos>"}), (), "a<bos>b"),
        (frozenset({"<bos>"}), ("<bos>b",), "a"),
        (frozenset({"<eos>"}), ("a<bos>",), ""),
    ):
        params = AnswerParams(stop=stop, shown=shown)
        answer = Answer(session.tokenizer, (EOS,), VOCAB_SIZE, SamplingParams(), params)
        assert "".join(answer.push(token) for token in (97, BOS, 98)) + answer.flush() == expected
