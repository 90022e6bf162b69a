"""Sampling against transformers' logits processors, and statistics of the draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sinkrt import BackendError, UsageError
from sinkrt.sampler import FIRST_CANDIDATES, Sampler, SamplingParams, candidates, penalized
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

NONE = np.empty(0, dtype=np.int64)


def random_logits(vocab_size: int, seed: int = 0, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(vocab_size) * spread).astype(np.float32)


def distribution(logits: np.ndarray, params: SamplingParams, recent: np.ndarray = NONE) -> np.ndarray:
    """float64 [vocab] probabilities that `Sampler` draws from."""
    if params.repetition_penalty != 1:
        logits = penalized(logits, recent, params.repetition_penalty, np.empty_like(logits))
    ids, weights = candidates(logits, params)
    dense = np.zeros(logits.size)
    dense[ids] = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    return dense


def transformers_distribution(logits: np.ndarray, params: SamplingParams, recent: np.ndarray) -> np.ndarray:
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    scores = processors(torch.tensor(recent[None]), torch.tensor(logits[None].astype(np.float64)))
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize("vocab_size", [7, 1000, 32003])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 40, 10**6])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.3, 1e-6])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
def test_the_distribution_is_that_of_transformers(
    vocab_size: int, temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    logits = random_logits(vocab_size)
    recent = np.random.default_rng(1).integers(0, vocab_size, 30)  # with repeats
    params = SamplingParams(temperature, top_k, top_p, penalty)
    got = distribution(logits, params, recent)
    want = transformers_distribution(logits, params, recent)
    assert ((got > 0) == (want > 0)).all()
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-12)


def test_a_nucleus_wider_than_the_first_candidates() -> None:
    logits = random_logits(20_000, spread=0.1)
    params = SamplingParams(temperature=1.0, top_p=0.9)
    got = distribution(logits, params)
    assert (got > 0).sum() > 8 * FIRST_CANDIDATES
    np.testing.assert_allclose(got, transformers_distribution(logits, params, np.zeros(0, np.int64)), rtol=1e-5)


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = random_logits(100)
    with np.errstate(all="raise", under="ignore"):
        got = distribution(logits, SamplingParams(temperature=temperature))
    assert got[logits.argmax()] == 1.0


def test_greedy_takes_the_penalty_into_account_and_leaves_logits_alone() -> None:
    logits = np.array([1.0, 3.0, 2.5, -1.0], dtype=np.float32)
    before = logits.copy()
    sampler = Sampler(SamplingParams(repetition_penalty=1.5), 4)
    assert sampler.sample(logits, NONE, 0) == 1
    assert sampler.sample(logits, np.array([1, -1, 1, -1]), 1) == 2
    assert sampler.sample(logits, np.array([-1, -1]), 2) == 1
    warm = Sampler(SamplingParams(temperature=1.0, top_k=2, top_p=0.9, repetition_penalty=1.5), 4)
    warm.sample(logits, np.array([1, 3]), 3)
    np.testing.assert_array_equal(logits, before)


def test_draws_follow_the_distribution() -> None:
    logits = random_logits(50, spread=1.5)
    params = SamplingParams(temperature=1.3, top_k=20, top_p=0.9, seed=5)
    sampler = Sampler(params, 50)
    draws = 20_000
    counts = np.bincount([sampler.sample(logits, NONE, t) for t in range(draws)], minlength=50)
    want = distribution(logits, params) * draws
    assert not counts[want == 0].any()
    kept = want > 0
    chi_squared = float(((counts[kept] - want[kept]) ** 2 / want[kept]).sum())
    degrees = int(kept.sum()) - 1
    assert chi_squared < degrees + 5 * np.sqrt(2 * degrees)


def test_a_draw_depends_on_seed_and_position_only() -> None:
    logits = random_logits(500)

    def draws(seed: int, positions: range) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=2.0, seed=seed), 500)
        return [sampler.sample(logits, NONE, t) for t in positions]

    assert draws(1, range(60))[40:] == draws(1, range(40, 60))
    assert draws(1, range(60)) != draws(2, range(60))
    assert len(set(draws(2**64 - 1, range(2**40, 2**40 + 50)))) > 20


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_draw_have_weight(uniform: float) -> None:
    logits = np.array([-1e9, 0.0, 1.0, 0.5, -1e9], dtype=np.float32)
    token = Sampler(SamplingParams(temperature=1.0), 5, lambda _seed, _position: uniform).sample(logits, NONE, 0)
    assert token == (1 if uniform == 0 else 3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers(temperature: float, value: float) -> None:
    logits = random_logits(10)
    logits[3] = value
    with pytest.raises(BackendError, match="logits"):
        Sampler(SamplingParams(temperature), 10).sample(logits, NONE, 0)


def test_tokens_that_are_ruled_out_are_never_drawn() -> None:
    logits = np.full(10, -np.inf, dtype=np.float32)
    logits[[2, 7]] = 0.0
    sampler = Sampler(SamplingParams(temperature=1.0, top_p=0.99, top_k=5, seed=0), 10)
    assert {sampler.sample(logits, NONE, t) for t in range(50)} == {2, 7}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, 100.1, 1e300, 10**400, np.nan, np.inf, "1", None, True]),
        ("top_k", [-1, 2**31, 10**400, 1.0, None, True]),
        ("top_p", [0, -0.0, 1.0001, np.nan, 10**400, "1"]),
        ("repetition_penalty", [0, -1, 1e-300, 5e-324, 0.0099, 100.1, 1e300, np.nan, np.inf, -np.inf]),
        ("seed", [-1, 2**64, 10**5000, 1.0, True, "1"]),
    ],
)
def test_numbers_out_of_range_are_one_line(name: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(UsageError, match=f"^{name}: received .*, expected .*; change {name}$"):
            SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_numbers_at_their_limits_give_finite_weights() -> None:
    logits = random_logits(50, spread=1e30)
    recent = np.arange(25)
    for temperature in (5e-324, 1e-38, 100, np.float32(0.5)):
        for penalty in (0.01, 100, np.float64(1.5)):
            for top_p in (5e-324, 1):
                params = SamplingParams(temperature, np.int64(0), top_p, penalty, 2**64 - 1)  # type: ignore[arg-type]
                with np.errstate(all="raise", under="ignore"):
                    got = distribution(logits, params, recent)
                assert np.isfinite(got).all()
                assert got.sum() == pytest.approx(1)


def test_a_penalty_that_overflows_is_no_fault_of_the_stream() -> None:
    logits = np.array([3e38, 1.0], dtype=np.float32)
    sampler = Sampler(SamplingParams(repetition_penalty=0.01), 2)
    with pytest.raises(UsageError, match="repetition_penalty"):
        sampler.sample(logits, np.array([0]), 0)
    assert sampler.sample(logits, np.array([1]), 0) == 0
