"""Several answers, log probabilities, penalties and bias: against a session of its own, in OpenAI's shapes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from sinkexport.serve.settings import Limits
from sinkrt import Session
from sinkrt.logit_rules import LogitParams, LogitRules
from sinkrt.sampler import Sampler, SamplingParams

from tests.exporter.serve.serving import Alone, Served, alone, chat_ids, many_bundle, serving, user
from tests.exporter.serve.shapes import completion_chunk, events, strict

__all__ = ["alone", "many_bundle"]  # fixtures
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]


@pytest.fixture(scope="module")
def served(many_bundle: Path) -> Iterator[Served]:
    with serving(many_bundle, Limits(max_tokens=100, max_waiting=3, grace_s=0)) as served:
        yield served


def ask(served: Served, body: dict[str, Any], path: str = COMPLETIONS) -> dict[str, Any]:
    response = httpx.post(served.url + path, json={"max_tokens": 12, "ignore_eos": True, **body}, timeout=60)
    assert response.status_code == 200, response.text
    return dict(response.json())


def stream(served: Served, body: dict[str, Any], path: str = COMPLETIONS) -> list[dict[str, Any]]:
    body = {"max_tokens": 12, "ignore_eos": True, **body, "stream": True}
    return events(httpx.post(served.url + path, json=body, timeout=60))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_each_choice_is_what_its_seed_says_alone(served: Served, alone: Alone, n: int) -> None:
    body = {"prompt": LONG, "n": n, "seed": 7, "temperature": 1.1, "best_of": n}
    whole = strict(Completion, ask(served, body))
    expected = [alone.texts([LONG], 12, temperature=1.1, seed=7 + i, ignore_eos=True)[0] for i in range(n)]
    assert [choice.text for choice in whole.choices] == expected
    assert [choice.index for choice in whole.choices] == list(range(n))
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(LONG), 12 * n)
    chunks = [completion_chunk(chunk) for chunk in stream(served, body)[:-1]]
    texts = ["".join(c.choices[0].text for c in chunks if c.choices[0].index == i) for i in range(n)]
    assert texts == expected


def test_choices_of_a_chat(served: Served, alone: Alone) -> None:
    body = {"messages": [user("hi")], "n": 3, "seed": 1, "stream_options": {"include_usage": True}}
    whole = strict(ChatCompletion, ask(served, body, CHAT))
    ids = chat_ids(alone.tokenizer, [user("hi")])
    expected = [alone.texts([ids], 12, temperature=1.0, seed=1 + i, ignore_eos=True)[0] for i in range(3)]
    assert [choice.message.content for choice in whole.choices] == expected
    chunks = [strict(ChatCompletionChunk, chunk) for chunk in stream(served, body, CHAT)]
    assert [chunk.choices[0].index for chunk in chunks[:3]] == [0, 1, 2]
    assert all(chunk.choices[0].delta.role == "assistant" for chunk in chunks[:3])
    for i in range(3):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == i]
        assert "".join(choice.delta.content or "" for choice in mine) == expected[i]
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 36


def test_the_prompt_is_fed_once(many_bundle: Path) -> None:
    with serving(many_bundle, Limits(max_tokens=100, grace_s=0)) as served:
        ask(served, {"prompt": LONG, "n": 3})
        served.wait_idle()
        assert served.server.decode_loop.totals.prompt_tokens == len(LONG)
        assert served.server.decode_loop.totals.answer_tokens == 36
    with serving(many_bundle, Limits(max_tokens=100, max_parked_bytes=0, grace_s=0)) as served:
        first = ask(served, {"prompt": LONG, "n": 3, "temperature": 0})
        assert len({choice["text"] for choice in first["choices"]}) == 1
        served.wait_idle()
        assert served.server.decode_loop.totals.prompt_tokens == 3 * len(LONG), "no memory for a copy"


def test_choices_after_a_prompt_that_a_stream_has_taken(served: Served, alone: Alone) -> None:
    """The first one goes on where an idle stream is; the others get the same all the same."""
    first = ask(served, {"prompt": LONG, "temperature": 0})
    more = [*LONG, *alone.tokenizer.encode(first["choices"][0]["text"])]
    for prompt in (more, [*more, 5, 6, 7]):
        answer = ask(served, {"prompt": prompt, "n": 3, "temperature": 0})
        assert {choice["text"] for choice in answer["choices"]} == set(alone.texts([prompt], 12, ignore_eos=True))


def test_choices_count_towards_the_limit_and_leave_nothing_behind(served: Served) -> None:
    """Three streams and three that wait."""

    def status(n: int) -> int:
        body = {"prompt": "x", "n": n, "max_tokens": 1}
        return httpx.post(served.url + COMPLETIONS, json=body, timeout=60).status_code

    long = {"prompt": "x", "n": 3, "max_tokens": 100, "ignore_eos": True, "stream": True}
    with httpx.Client(timeout=60) as client:
        for _ in range(4):
            with client.stream("POST", served.url + COMPLETIONS, json=long) as first:
                next(first.iter_lines())
        served.wait_until(lambda: not served.server.decode_loop.responses)
    assert [status(3) for _ in range(5)] == [200] * 5
    assert httpx.post(served.url + CHAT, json={"messages": [user("x")], "n": 2, "conversation": "c"}).status_code == 400
    body = {"prompt": [300], "n": 3}
    for _ in range(5):
        assert httpx.post(served.url + COMPLETIONS, json=body).status_code == 400
    assert status(3) == 200


# --- log probabilities ---


def expected_logprobs(bundle: Path, prompt: list[int], ids: list[int]) -> list[np.ndarray]:
    """float64 [vocab] log probabilities before each of the ids."""
    found = []
    with Session.load(bundle, threads=1, verify=False) as session:
        logits = session.prefill([prompt])
        for token in ids:
            row = logits[0].astype(np.float64)
            found.append(row - row.max() - np.log(np.exp(row - row.max()).sum()))
            logits = session.step([token])
    return found


def test_logprobs_of_a_chat(served: Served, alone: Alone) -> None:
    body = {"messages": [user("hé")], "logprobs": True, "top_logprobs": 3, "seed": 3, "temperature": 1.5}
    whole = strict(ChatCompletion, ask(served, body, CHAT))
    entries = whole.choices[0].logprobs.content
    assert len(entries) == whole.usage.completion_tokens == 12
    ids = [entry.bytes[0] for entry in entries]  # the toy's tokens are bytes
    assert bytes(ids).decode("utf-8", "replace") == whole.choices[0].message.content
    prompt = chat_ids(alone.tokenizer, [user("hé")])
    for entry, token, row in zip(entries, ids, expected_logprobs(alone.bundle, prompt, ids), strict=True):
        assert entry.logprob == pytest.approx(row[token], abs=1e-5)
        assert entry.token == bytes([token]).decode("utf-8", "replace")
        best = np.argsort(-row, kind="stable")[:3]
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(row[best].tolist(), abs=1e-5)
        assert [top.bytes for top in entry.top_logprobs if top.bytes] == [[i] for i in best if i < 256] + [
            list(top.bytes) for top in entry.top_logprobs if top.bytes and len(top.bytes) > 1
        ]
    chunks = [strict(ChatCompletionChunk, chunk) for chunk in stream(served, body, CHAT)]
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert streamed == entries
    plain = ask(served, {**body, "logprobs": False, "top_logprobs": None}, CHAT)
    assert plain["choices"][0]["logprobs"] is None
    assert plain["choices"][0]["message"]["content"] == whole.choices[0].message.content
    only = ask(served, {**body, "top_logprobs": 0}, CHAT)
    assert all(entry["top_logprobs"] == [] for entry in only["choices"][0]["logprobs"]["content"])


def test_logprobs_of_a_completion(served: Served) -> None:
    body = {"prompt": LONG, "logprobs": 2, "seed": 3, "n": 2}
    whole = strict(Completion, ask(served, body))
    for choice in whole.choices:
        logs = choice.logprobs
        assert len(logs.tokens) == len(logs.token_logprobs) == len(logs.top_logprobs) == len(logs.text_offset) == 12
        assert logs.text_offset[0] == 0
        assert logs.text_offset == sorted(logs.text_offset)
        for name, logprob, top in zip(logs.tokens, logs.token_logprobs, logs.top_logprobs, strict=True):
            assert top[name] == logprob
            assert 2 <= len(top) <= 3
        raw = b"".join(
            bytes.fromhex(name[6:].replace("\\x", "")) if name.startswith("bytes:") else name.encode()
            for name in logs.tokens
        )
        assert raw.decode("utf-8", "replace") == choice.text
    chunks = [completion_chunk(chunk) for chunk in stream(served, body)[:-1]]
    for choice in whole.choices:
        mine = [c.choices[0].logprobs for c in chunks if c.choices[0].index == choice.index and c.choices[0].logprobs]
        assert [name for logs in mine for name in logs.tokens] == choice.logprobs.tokens
        assert [at for logs in mine for at in logs.text_offset] == choice.logprobs.text_offset
    assert ask(served, {**body, "logprobs": 0})["choices"][0]["logprobs"]["top_logprobs"][0]
    assert ask(served, {**body, "logprobs": None})["choices"][0]["logprobs"] is None


def test_tokens_of_a_stop_text_are_reported(served: Served) -> None:
    """There is an entry for each token that usage counts."""
    whole = ask(served, {"prompt": [7, 8], "temperature": 0, "max_tokens": 60})["choices"][0]["text"]
    body = {"prompt": [7, 8], "temperature": 0, "max_tokens": 60, "stop": whole[10:13], "logprobs": 1}
    for stopped in (ask(served, body), stream(served, {**body, "stream_options": {"include_usage": True}})):
        chunks = stopped if isinstance(stopped, list) else [stopped]
        tokens = [t for c in chunks for o in c["choices"] if o["logprobs"] for t in o["logprobs"]["tokens"]]
        assert chunks[-1]["usage"]["completion_tokens"] == len(tokens)


# --- penalties and bias ---


def test_bias_forces_and_forbids(served: Served) -> None:
    forced = ask(served, {"prompt": LONG, "logit_bias": {"65": 100}, "temperature": 1})
    assert forced["choices"][0]["text"] == "A" * 12
    plain = ask(served, {"prompt": LONG, "temperature": 0, "logprobs": 0})["choices"][0]["logprobs"]["tokens"][0]
    token = int(plain[8:], 16) if plain.startswith("bytes:") else ord(plain)
    banned = ask(served, {"prompt": LONG, "temperature": 0, "logprobs": 0, "logit_bias": {str(token): -100}})
    assert plain not in banned["choices"][0]["logprobs"]["tokens"]
    chat = {"messages": [user("x")], "logit_bias": {"66": 100.0}}
    assert ask(served, chat, CHAT)["choices"][0]["message"]["content"] == "B" * 12


def test_penalties_end_repetitions(served: Served) -> None:
    body = {"prompt": LONG, "logit_bias": {"65": 40, "66": 39, "67": 38}, "temperature": 0}
    assert ask(served, body)["choices"][0]["text"] == "A" * 12
    assert ask(served, {**body, "presence_penalty": 1.5})["choices"][0]["text"] == "AB" + "A" * 10
    frequent = ask(served, {**body, "frequency_penalty": 1.0})["choices"][0]["text"]
    assert frequent[:4] == "AABA" or frequent[:3] == "ABA"
    assert set(frequent) == set("ABC")
    assert ask(served, {**body, "presence_penalty": -2, "frequency_penalty": -2})["choices"][0]["text"] == "A" * 12


def test_the_answer_is_that_of_the_rules_on_the_sessions_logits(served: Served, alone: Alone) -> None:
    wanted = LogitParams(0.7, 0.4, {5: 3.5, 200: -2.0})
    sampling = SamplingParams(0.8, 50, 0.9, 1.3, 11)
    with Session.load(alone.bundle, threads=1, verify=False) as session:
        rules = LogitRules(wanted, 258)
        sampler = Sampler(sampling, 258, rules=rules)
        session.prefill([LONG])
        ids: list[int] = []
        for _ in range(12):
            ids.append(sampler.sample(session.logits[0], session.recent_ids(0), int(session.position[0])))
            rules.take(ids[-1])
            session.step([ids[-1]])
        text = session.tokenizer.decode(ids)
    body = {
        "prompt": LONG,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.4,
        "logit_bias": {"5": 3.5, "200": -2},
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.9,
        "repetition_penalty": 1.3,
        "seed": 11,
    }
    assert ask(served, body)["choices"][0]["text"] == text
