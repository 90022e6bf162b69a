"""Bias, penalties and log probabilities against their formulas; siblings that share a prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sinkrt import Session, UsageError
from sinkrt.answer import AnswerParams
from sinkrt.logit_rules import LEAST_LOGPROB, LogitParams, LogitRules
from sinkrt.sampler import Sampler, SamplingParams
from sinkrt.scheduler import Scheduler
from sinkrt.text.token_bytes import TokenBytes
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.runtime.toy import Toy, build_toy, toy_tokenizer

NONE = np.empty(0, dtype=np.int64)
GREEDY = SamplingParams()


def random_logits(size: int = 100) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(size).astype(np.float32)


@pytest.mark.parametrize("seed", range(30))
def test_order_and_formula_are_those_of_vllm(seed: int) -> None:
    """Bias, then the repetition penalty, then frequency times count and presence."""
    random = np.random.default_rng(seed)
    logits = (random.standard_normal(12) * 2).astype(np.float32)
    recent, said = random.integers(-1, 12, 6), random.integers(0, 12, 8)
    rules = LogitRules(LogitParams(0.5, 0.25, {3: 2.0, 9: -1.0}), 12)
    for token in said:
        rules.take(int(token))
    expected = logits.copy()
    expected[3] += 2
    expected[9] -= 1
    seen = np.unique(recent[recent >= 0])
    expected[seen] = np.where(expected[seen] < 0, expected[seen] * 1.5, expected[seen] / 1.5)
    counts = np.bincount(said, minlength=12)
    expected -= 0.25 * counts + 0.5 * (counts > 0)
    before = logits.copy()
    params = SamplingParams(repetition_penalty=1.5)
    assert Sampler(params, 12, rules=rules).sample(logits, recent, 0) == expected.argmax()
    drawn = {Sampler(SamplingParams(1.0, 2, 1.0, 1.5, i), 12, rules=rules).sample(logits, recent, 0) for i in range(60)}
    assert drawn <= set(np.argsort(expected)[-2:].tolist())
    assert (logits == before).all()


def test_no_rules_change_nothing() -> None:
    logits = random_logits()
    for seed in range(20):
        params = SamplingParams(temperature=1, top_p=0.9, seed=seed)
        plain = Sampler(params, 100).sample(logits, NONE, 5)
        ruled = Sampler(params, 100, rules=LogitRules(LogitParams(top_logprobs=3), 100)).sample(logits, NONE, 5)
        assert plain == ruled


def test_log_probabilities() -> None:
    logits = random_logits(1000)
    logits[5] = -np.inf
    logits[[10, 20]] = logits.max() + 1
    shifted = logits.astype(np.float64) - logits.max()
    expected = shifted - np.log(np.exp(shifted).sum())
    report = LogitRules(LogitParams(top_logprobs=20), 1000).report(logits, 5)
    assert report is not None
    assert report.logprob == LEAST_LOGPROB
    assert [token for token, _ in report.top[:2]] == [10, 20], "equal ones by id"
    assert [token for token, _ in report.top] == np.argsort(-expected, kind="stable")[:20].tolist()
    np.testing.assert_allclose([p for _, p in report.top], np.sort(expected)[::-1][:20], atol=1e-6)
    small = LogitRules(LogitParams(top_logprobs=20), 3).report(logits[:3], 1)
    assert small is not None
    assert len(small.top) == 3
    assert LogitRules(LogitParams(), 3).report(logits[:3], 1) is None
    assert LogitRules(LogitParams(top_logprobs=0), 3).report(logits[:3], 1).top == ()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"presence_penalty": 2.1}, "presence_penalty: received 2.1"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"logit_bias": {5: 101}}, "logit_bias"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 1.5}, "top_logprobs"),
    ],
)
def test_wrong_options(options: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        LogitParams(**options)
    with pytest.raises(UsageError, match="token 100"):
        LogitRules(LogitParams(logit_bias={100: 1}), 100)


# --- bytes of tokens ---


def test_bytes_of_byte_level_tokens() -> None:
    tokenizer = toy_tokenizer()
    of = TokenBytes(tokenizer)
    assert [of(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert (of(256), of(257), of(9999)) == (b"<bos>", b"<eos>", b"")


def test_bytes_of_tokens_with_byte_fallback() -> None:
    words = ["<unk>", "<0xC3>", "<0xA9>", "\u2581", "a", "\u2581a", "b"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("\u2581", "a")], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    of = TokenBytes(tokenizer)
    assert [of(i) for i in range(1, 8)] == [b"\xc3", b"\xa9", b" ", b"a", b" a", b"b", b"<tool>"]


# --- siblings ---


def run(scheduler: Scheduler, names: list[str]) -> dict[str, str]:
    texts, ends = dict.fromkeys(names, ""), {}
    while scheduler.has_work:
        for event in scheduler.step():
            texts[event.conversation] += event.text
            ends[event.conversation] = event.finish_reason
    assert set(ends) == set(names)
    assert set(ends.values()) == {"length"}
    return texts


PROMPT = list(range(40, 60))
PARAMS = AnswerParams(12, ignore_eos=True)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("siblings")
    return build_toy(folder / "many", Toy(batch=2, chunk_size=4)), build_toy(folder / "one", Toy(chunk_size=4))


def expected(one: Path, count: int) -> dict[str, str]:
    found = {}
    for seed in range(count):
        with Session.load(one, threads=1, verify=False) as session:
            pieces = session.generate(PROMPT, max_tokens=12, temperature=1, seed=seed, ignore_eos=True)
            found[f"c{seed}"] = "".join(pieces)
    return found


@pytest.mark.parametrize("parked", [None, 0])
@pytest.mark.parametrize("count", [2, 5])
def test_siblings_say_what_they_would_alone(toys: tuple[Path, Path], parked: int | None, count: int) -> None:
    """More than there are streams too; with and without memory for copies."""
    with Session.load(toys[0], threads=1, verify=False) as session:
        scheduler = Scheduler(session, max_parked_bytes=parked, slice_tokens=5)
        for seed in range(count):
            sampling = SamplingParams(temperature=1, seed=seed)
            if seed == 0:
                scheduler.submit("c0", PROMPT, sampling, PARAMS)
            else:
                scheduler.submit_sibling("c0", f"c{seed}", PROMPT, sampling, PARAMS)
        names = [f"c{seed}" for seed in range(count)]
        assert run(scheduler, names) == expected(toys[1], count)
        fed = len(PROMPT) * (count if parked == 0 else 1)
        assert (scheduler.prompt_tokens, scheduler.answer_tokens) == (fed, 12 * count)
        assert parked == 0 or scheduler.position("c1") == len(PROMPT) + 12
        assert scheduler.find_start([*PROMPT, 1]) is None


def test_siblings_outlive_their_leader(toys: tuple[Path, Path]) -> None:
    for steps in (0, 2, 50):
        with Session.load(toys[0], threads=1, verify=False) as session:
            scheduler = Scheduler(session)
            scheduler.submit("c0", PROMPT, SamplingParams(temperature=1, seed=0), PARAMS)
            for seed in (1, 2):
                sampling = SamplingParams(temperature=1, seed=seed)
                scheduler.submit_sibling("c0", f"c{seed}", PROMPT, sampling, PARAMS)
            with pytest.raises(UsageError, match="sibling"):
                scheduler.submit_sibling("c0", "c1", PROMPT, GREEDY, PARAMS)
            for _ in range(min(steps, 3)):
                scheduler.step()
            scheduler.cancel("c2")
            scheduler.forget("c0")
            wanted = expected(toys[1], 2)
            texts = run(scheduler, ["c1"])
            assert texts["c1"] == wanted["c1"]
            assert scheduler.load.parked == 0


def test_a_sibling_needs_a_prompt_that_is_still_to_be_fed(toys: tuple[Path, Path]) -> None:
    with Session.load(toys[0], threads=1, verify=False) as session:
        scheduler = Scheduler(session)
        with pytest.raises(UsageError, match="conversation"):
            scheduler.submit_sibling("c0", "c1", PROMPT, GREEDY, PARAMS)
        scheduler.submit("c0", [5], GREEDY, PARAMS)
        scheduler.step()
        with pytest.raises(UsageError, match="sibling"):
            scheduler.submit_sibling("c0", "c1", [5], GREEDY, PARAMS)


def test_a_paused_sibling_goes_on_later(toys: tuple[Path, Path]) -> None:
    with Session.load(toys[0], threads=1, verify=False) as session:
        scheduler = Scheduler(session)
        scheduler.submit("c0", PROMPT, SamplingParams(temperature=1, seed=0), PARAMS)
        scheduler.submit_sibling("c0", "c1", PROMPT, SamplingParams(temperature=1, seed=1), PARAMS)
        scheduler.pause("c1")
        wanted = expected(toys[1], 2)
        assert run(scheduler, ["c0"]) == {"c0": wanted["c0"]}
        scheduler.resume("c1")
        assert run(scheduler, ["c1"]) == {"c1": wanted["c1"]}
        assert scheduler.prompt_tokens == len(PROMPT)
