"""Answers with guessed tokens: text, positions and states are those of an answer without."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sinkrt import Session
from sinkrt.contract.sampling import SamplingParams
from sinkrt.errors import UsageError
from sinkrt.speculate.choice import Speculation
from sinkrt.speculate.draft_model import DraftModel
from sinkrt.speculate.tally import Tally
from sinkrt.speculate.vocabulary import difference

from tests.support import SharedExports, TinyBundle, random_ids, refused, run_cli

GEOMETRY: dict[str, Any] = {"num_sink_tokens": 3, "window_size": 21, "chunk_size": 8, "speculate": 6, "tokenizer": True}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 3}
COUNT = 150  # six wraps


class Oracle:
    """A drafter that knows the answer, and lies now and then: every length of accepted guesses comes up."""

    cost = 0.0

    def __init__(self, answer: list[int], seed: int = 0) -> None:
        self._answer, self._random = answer, np.random.default_rng(seed)
        self._known = -1  # how many of the answer's tokens are known

    def start(self, ids: np.ndarray, position: int, sampling: SamplingParams) -> None:
        self._known = max(0, position - self._begin) if self._known >= 0 else 0
        if self._known == 0:
            self._begin = position

    def propose(self, ids: list[int], count: int) -> list[int]:
        self._known += len(ids)
        guess = self._answer[self._known : self._known + count]
        wrong = int(self._random.integers(0, count + 3))
        self._guess = [(one + 1) % 97 if i == wrong else one for i, one in enumerate(guess)]
        return list(self._guess)

    def accepted(self, count: int) -> None:
        self._known += count

    def close(self) -> None:
        pass


@pytest.fixture
def bundle(shared_export: SharedExports) -> TinyBundle:
    return shared_export("llama", **GEOMETRY)


@pytest.fixture
def session(bundle: TinyBundle) -> Session:
    return bundle.session()


def plain(session: Session, prompt: list[int], **options: Any) -> tuple[list[str], list[int]]:
    session.reset()
    pieces = list(session.generate(prompt, **options))
    return pieces, session.recent_ids().tolist()


def with_drafter(session: Session, answer: list[int], seed: int = 0) -> Speculation:
    """Let ``ngram`` be an `Oracle`."""
    speculation = session.speculation("ngram")
    speculation.drafter, speculation.tally = Oracle(answer, seed), Tally()
    return speculation


def answer_of(session: Session, prompt: list[int], count: int, **options: Any) -> list[int]:
    """Ids of a plain answer, all of them."""
    session.reset()
    found: list[int] = []
    for _ in session.generate(prompt, max_tokens=count, ignore_eos=True, **options):
        new = int(session.position[0]) - len(prompt) - len(found)
        found += session.recent_ids().tolist()[-new:]
    return found


PROMPT = random_ids(1, 30)[0].tolist()


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_text_whatever_is_guessed(options: dict[str, Any], seed: int, session: Session) -> None:
    ids = answer_of(session, PROMPT, COUNT, **options)
    assert len(ids) == COUNT
    wanted = plain(session, PROMPT, max_tokens=COUNT, ignore_eos=True, **options)
    speculation = with_drafter(session, ids, seed)
    found = plain(session, PROMPT, max_tokens=COUNT, ignore_eos=True, speculate="ngram", **options)
    assert found == wanted
    tally = speculation.tally
    assert tally.tokens == COUNT
    assert tally.rounds > 20
    assert 0.3 < tally.acceptance < 1
    assert tally.accepted + tally.rounds + tally.steps == COUNT


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_prompt_lookup(options: dict[str, Any], session: Session) -> None:
    wanted = plain(session, PROMPT, max_tokens=COUNT, ignore_eos=True, **options)
    assert plain(session, PROMPT, max_tokens=COUNT, ignore_eos=True, speculate="ngram", **options) == wanted


def test_states_are_those_of_each_piece(session: Session, tmp_path: Path) -> None:
    """Whoever stops after a piece, in the middle of a guess, finds position, ids, states and logits of that piece."""
    ids = answer_of(session, PROMPT, 40)
    with_drafter(session, ids)
    for stop in (1, 2, 3, 7, 20, 33):
        ends = []
        for speculate in (None, "ngram"):
            session.reset()
            pieces = session.generate(PROMPT, ignore_eos=True, speculate=speculate)
            text = [next(pieces) for _ in range(stop)]
            session.save_state(tmp_path / str(speculate))
            pieces.close()
            rest = "".join(session.generate(None, max_tokens=9, ignore_eos=True))
            session.load_state(tmp_path / str(speculate))
            ends.append((text, rest, session.position.tolist(), session.recent_ids().tolist(), session.logits.copy()))
            with_drafter(session, ids)
        assert ends[0][:4] == ends[1][:4]
        np.testing.assert_allclose(ends[0][4], ends[1][4], atol=1e-4)


def test_a_stream_that_others_feed_meanwhile(session: Session) -> None:
    """The rest of a guess is dropped; the answer goes on where the stream stands, as it does without guesses."""
    ids = answer_of(session, PROMPT, 40)
    found = []
    for speculate in (None, "ngram"):
        with_drafter(session, ids)
        session.reset()
        text = []
        for number, piece in enumerate(session.generate(PROMPT, max_tokens=30, ignore_eos=True, speculate=speculate)):
            text.append(piece)
            if number in (4, 5, 11):
                session.step([number])
            if number == 15:
                session.verify([1, 2])
        found.append((text, session.recent_ids().tolist()))
    assert found[0] == found[1]


def test_limits_ends_and_stops_inside_a_guess(session: Session) -> None:
    ids = answer_of(session, PROMPT, 40)
    words = [session.tokenizer.decode([one]) for one in ids]
    for options in (
        *({"max_tokens": n, "ignore_eos": True} for n in (1, 2, 5, 13)),
        *({"max_tokens": 40, "ignore_eos": True, "stop": words[n].strip()} for n in (3, 9, 17)),
    ):
        wanted = plain(session, PROMPT, **options)
        with_drafter(session, ids)
        assert plain(session, PROMPT, speculate="ngram", **options) == wanted
    assert int(session.position[0]) <= len(PROMPT) + 40


def test_the_end_of_a_text_inside_a_guess(shared_export: SharedExports, tmp_path: Path) -> None:
    bundle = shared_export("llama", **GEOMETRY)
    session = bundle.session()
    ids = answer_of(session, PROMPT, 40)
    model = session.manifest.model
    object.__setattr__(model, "eos_token_ids", (ids[9],))
    wanted = plain(session, PROMPT)
    assert len(wanted[0]) <= 9
    with_drafter(session, ids)
    assert plain(session, PROMPT, speculate="ngram") == wanted


# --- a smaller model that drafts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_draft_model(options: dict[str, Any], session: Session, shared_export: SharedExports) -> None:
    """One that is the model itself, of a smaller window, is right until that has lost what the model still sees."""
    same = shared_export("llama", **{**GEOMETRY, "window_size": 19, "speculate": None})
    other = shared_export("qwen2", **{**GEOMETRY, "speculate": None})
    wanted = plain(session, PROMPT[:5], max_tokens=COUNT, ignore_eos=True, **options)
    for draft, least in ((same, 0.2), (other, 0.0)):
        name = f"draft:{draft.path}"
        assert plain(session, PROMPT[:5], max_tokens=COUNT, ignore_eos=True, speculate=name, **options) == wanted
        assert session.speculation(name).tally.acceptance >= least
    session.close()


def test_a_draft_model_keeps_its_own_window(bundle: TinyBundle, shared_export: SharedExports) -> None:
    """Rejected guesses are taken back: after many it knows the stream as if it had made none."""
    draft = shared_export("qwen2", **{**GEOMETRY, "speculate": None}).session()
    count = draft.manifest.model.vocab_size
    from sinkrt.speculate.vocabulary import VocabularyMap

    model = DraftModel(draft, VocabularyMap(np.arange(count), np.arange(count)), 6)
    tokens = random_ids(200)
    model.start(tokens[:10], 10, SamplingParams())
    at, random = 10, np.random.default_rng(0)
    while at < 190:
        guess = model.propose(tokens[at : at + 1].tolist(), int(random.integers(1, 7)))
        assert guess
        model.accepted(0)
        at += 1
    alone = shared_export("qwen2", **{**GEOMETRY, "speculate": None}).session()
    alone.prefill(tokens[:at])
    model.propose([], 1)
    np.testing.assert_array_equal(draft.position, alone.position)
    wanted, found = alone.step([5]).copy(), draft.step([5])
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_draft_bundles_that_do_not_fit(session: Session, shared_export: SharedExports, tmp_path: Path) -> None:
    two = shared_export("llama", **{**GEOMETRY, "speculate": None, "batch": 2})
    with refused("draft bundle", "2 streams", "batch 1", error=UsageError):
        session.speculation(f"draft:{two.path}")
    small = shared_export("llama", **{**GEOMETRY, "speculate": None, "window_size": 5, "chunk_size": 4})
    with refused("a window of 5 tokens", error=UsageError):
        session.speculation(f"draft:{small.path}")
    hybrid = shared_export("qwen3_next", **{**GEOMETRY, "speculate": None})
    with refused("recurrent states", error=UsageError):
        session.speculation(f"draft:{hybrid.path}")


def test_differences_of_tokenizers_are_named() -> None:
    ours = {
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    }
    changed = functools.partial(dict, ours)
    model = ours["model"]
    assert difference(ours, changed()) is None
    assert difference(ours, {**ours, "model": {**model, "vocab": {"ab": 0, "b": 1, "a": 2}}}) is None  # mapped
    for theirs, expected in (
        ({**ours, "normalizer": {"type": "NFC"}}, "normalizer"),
        ({**ours, "pre_tokenizer": None}, "pre_tokenizer"),
        ({**ours, "model": {**model, "type": "Unigram"}}, "type"),
        ({**ours, "model": {**model, "merges": [["b", "a"]]}}, "merges[0]"),
        ({**ours, "model": {**model, "merges": []}}, "0 merges, not 1"),
        ({**ours, "model": {**model, "vocab": {"a": 0, "b": 1}}}, "no token 'ab'"),
        ({**ours, "model": {**model, "vocab": {**model["vocab"], "c": 3}}}, "a token more, 'c'"),
    ):
        assert expected in str(difference(ours, theirs))


# --- commands ---------------------------------------------------------------------------------------------------------


def test_bad_choices(session: Session, shared_export: SharedExports) -> None:
    for name in ("mtp", "draft:", "Ngram"):
        with refused("speculate", f"'{name}'", "ngram or draft:DIR", error=UsageError):
            session.generate(PROMPT, speculate=name)
    assert session.position.tolist() == [0]
    without = shared_export("llama", **{**GEOMETRY, "speculate": None})
    with refused("without a graph that verifies drafts", "--speculate 10", error=UsageError):
        without.session().generate(PROMPT, speculate="ngram")
    run_cli("run", without.path, "--prompt", "w1", "--speculate", "ngram").refusal("speculate", "--speculate 10")


def test_run_with_guesses(bundle: TinyBundle) -> None:
    prompt = " ".join(f"w{i}" for i in (3, 4, 5, 6, 7, 3, 4, 5))
    options = ("--prompt", prompt, "--max-tokens", 30, "--ignore-eos", "--threads", 1)
    wanted = run_cli("run", bundle.path, *options).succeeded()
    found = run_cli("run", bundle.path, *options, "--speculate", "ngram", "--stats").succeeded()
    assert found.out == wanted.out
    assert "tokens a step" in found.err


def test_bench_with_guesses(bundle: TinyBundle, tmp_path: Path) -> None:
    run = ("bench", bundle.path, "--speculate", "ngram", "--steps", 12, "--threads", 1)
    found = run_cli(*run, "--json", tmp_path / "figures.json").succeeded()
    assert "rewrite" in found.out
    assert "times as fast on texts that repeat" in found.out
    assert '"tokens_per_step"' in (tmp_path / "figures.json").read_text()
    run_cli(*run, "--warmup", 2).refusal("--warmup", "--speculate")


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("form", [{"regex": "(?s:.*)"}, {"regex": "[^e]*"}], ids=["any", "without-e"])
def test_answers_that_match_a_form_are_the_same_too(
    session: Session, form: dict[str, str], options: dict[str, Any]
) -> None:
    ids = answer_of(session, PROMPT, 60, **form, **options)
    wanted = plain(session, PROMPT, max_tokens=60, ignore_eos=True, **form, **options)
    speculation = with_drafter(session, ids)
    assert plain(session, PROMPT, max_tokens=60, ignore_eos=True, speculate="ngram", **form, **options) == wanted
    assert speculation.tally.accepted > 10
    assert form["regex"] != "[^e]*" or "e" not in "".join(wanted[0])
