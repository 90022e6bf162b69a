"""Parts of speculation that need no bundle: prompt lookup, lengths of guesses, and what sampling gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sinkrt.contract.sampling import SamplingParams
from sinkrt.sampler import Sampler, candidates, penalized
from sinkrt.speculate.draft_length import FIRST_PAUSE, MAX_PAUSE, DraftLength
from sinkrt.speculate.ngram import NgramDrafter
from sinkrt.speculate.tally import Tally

SAMPLING = SamplingParams()


def started(ids: list[int], **options: object) -> NgramDrafter:
    drafter = NgramDrafter(**options)  # type: ignore[arg-type]
    drafter.start(np.array(ids, dtype=np.int64), len(ids), SAMPLING)
    return drafter


def searched(ids: list[int], lengths: tuple[int, ...], count: int) -> list[int]:
    """The same by a search of everything."""
    for length in lengths:
        for end in range(len(ids) - 1, length - 1, -1):
            if len(ids) >= length and ids[end - length : end] == ids[-length:]:
                found = list(ids)
                for i in range(count):
                    found.append(found[end + i])
                return found[len(ids) :]
    return []


@given(st.integers(0, 2**32 - 1))
def test_prompt_lookup_finds_what_a_search_finds(seed: int) -> None:
    random = np.random.default_rng(seed)
    ids, count = random.integers(0, 4, random.integers(1, 60)).tolist(), int(random.integers(1, 12))
    cut = int(random.integers(0, len(ids)))
    drafter, known = started(ids[:cut]), ids[:cut]
    for token in ids[cut:]:
        guess = drafter.propose([token], count)
        known.append(token)
        assert guess == searched(known, (5, 3), count)
        accepted = int(random.integers(0, len(guess) + 1))
        drafter.accepted(accepted)
        known += guess[:accepted]


def test_prompt_lookup_keeps_a_bounded_number_of_tokens() -> None:
    drafter = started([], max_ids=64)
    random = np.random.default_rng(0)
    for token in random.integers(0, 5, 1000).tolist():
        drafter.propose([token], 3)
        drafter.accepted(0)
    assert len(drafter._ids) <= 64
    assert all(len(index) <= 64 for index in drafter._index.values())


def test_a_stream_that_is_known_keeps_what_came_before_it() -> None:
    drafter = started([1, 2, 3, 9, 8, 7, 6])
    drafter.start(np.array([9, 8, 7, 6]), 7, SAMPLING)
    assert drafter.propose([1, 2, 3], 2) == [9, 8]
    drafter.start(np.array([5, 5]), 2, SAMPLING)
    assert drafter.propose([1, 2, 3], 2) == []


def test_guesses_grow_while_they_are_right_and_stop_where_none_is() -> None:
    length = DraftLength(10)
    for _ in range(20):
        length.update(count := length.next(), count)
    assert length.next() == 10
    lengths = []
    for _ in range(3000):
        lengths.append(length.next())
        if lengths[-1]:
            length.update(lengths[-1], 0)
    assert max(lengths[30:]) <= 2
    # Far into a text that nothing repeats one step in MAX_PAUSE is a trial.
    assert sum(1 for one in lengths[1000:] if one) <= 2000 // MAX_PAUSE + 1
    length = DraftLength(10)
    tokens = trials = 0
    while tokens < 200:
        tokens += 1
        if count := length.next():
            trials += 1
            length.update(count, 0)
    assert trials <= 12
    assert FIRST_PAUSE > 1


def test_guesses_that_cost_a_step_each_are_short() -> None:
    cheap, dear = (DraftLength(10, cost) for cost in (0.0, 0.4))
    for length in (cheap, dear):
        for accepted in (2, 1, 3, 0, 2, 2, 1, 3):
            length.update(4, accepted)
    assert 0 < dear.next() < cheap.next()


def test_tally() -> None:
    tally = Tally(tokens=30, steps=5, rounds=5, guessed=40, accepted=20)
    assert (tally.tokens_per_step, tally.acceptance) == (3.0, 0.5)
    assert "3.00 tokens a step" in tally.report()
    assert Tally().tokens_per_step == 1.0


VOCAB = 12
DRAWS = 200_000


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.7, top_k=6, seed=2),
        SamplingParams(temperature=1.3, top_p=0.8, seed=3),
        SamplingParams(temperature=0.9, top_k=9, top_p=0.9, repetition_penalty=1.5, seed=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("guess", [3, "sampled"])
def test_guesses_do_not_change_the_distribution(params: SamplingParams, guess: int | str) -> None:
    """A guess is kept where the model's own pick is the same. Chi-square over tokens, of guesses that are always the
    same and of those that a smaller model draws with the same numbers; 200,000 where all options are set.
    """
    random = np.random.default_rng(7)
    logits = random.normal(0, 1.5, VOCAB).astype(np.float32)
    others = (logits + random.normal(0, 0.5, VOCAB)).astype(np.float32)
    recent = np.array([1, 4, 4, -1], dtype=np.int64)
    model, draft = (Sampler(params, VOCAB) for _ in range(2))
    counts, kept = np.zeros(VOCAB), 0
    has_all = params.repetition_penalty != 1 and guess == "sampled"
    for position in range(DRAWS if has_all else DRAWS // 20):
        pick = model.sample(logits, recent, position)
        guessed = draft.sample(others, recent, position) if guess == "sampled" else guess
        kept += pick == guessed
        counts[pick] += 1
    ids, weights = candidates(penalized(logits, recent, params.repetition_penalty, np.empty_like(logits)), params)
    expected = np.zeros(VOCAB)
    expected[ids] = weights / weights.sum() * counts.sum()
    assert not counts[expected == 0].any()
    used = expected > 0
    chi_square = float((((counts - expected) ** 2)[used] / expected[used]).sum())
    assert chi_square < 40  # 11 degrees of freedom: p < 4e-5
    if guess == "sampled":
        ours, theirs = (np.bincount(ids, w, VOCAB) for ids, w in _shares((logits, others), recent, params))
        assert kept / counts.sum() > 1.2 * (ours * theirs).sum()  # which independent draws would give


def _shares(logits: tuple[np.ndarray, ...], recent: np.ndarray, params: SamplingParams) -> list[tuple]:
    found = []
    for each in logits:
        out = penalized(each, recent, params.repetition_penalty, np.empty_like(each))
        ids, weights = candidates(out, params)
        found.append((ids, weights / weights.sum()))
    return found
