"""The HTTP API with OpenAI's own client: each client hears what a session of its own would say."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from sinkexport.serve.settings import Limits
from sinkrt import BackendError
from sinkrt.sampler import Sampler

from tests.exporter.serve.serving import (
    ENDLESS,
    Alone,
    Served,
    alone,
    chat_ids,
    many_bundle,
    served,
    serving,
    user,
)
from tests.runtime.toy import EOS

__all__ = ["alone", "many_bundle", "served"]  # fixtures


def test_chat_says_what_a_session_says(served: Served, alone: Alone) -> None:
    messages = [{"role": "system", "content": "Be brief."}, user("Hello, wörld")]
    whole = served.client().chat.completions.create(
        model="toy",
        messages=messages,
        max_tokens=20,
        temperature=0.7,
        top_p=0.9,
        seed=4,
        extra_body={"top_k": 50, "repetition_penalty": 1.2, "ignore_eos": True},
    )
    ids = chat_ids(alone.tokenizer, messages)
    expected = alone.texts(
        [ids], 20, temperature=0.7, top_p=0.9, seed=4, top_k=50, repetition_penalty=1.2, ignore_eos=True
    )
    choice = whole.choices[0]
    assert (whole.object, whole.model, choice.index, choice.message.role) == ("chat.completion", "toy", 0, "assistant")
    assert [choice.message.content] == expected
    assert choice.finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), 20)
    assert whole.usage.total_tokens == len(ids) + 20


@pytest.mark.parametrize("usage", [False, True])
def test_streams_say_the_same(served: Served, alone: Alone, usage: bool) -> None:
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(
        served.client().chat.completions.create(
            model="toy",
            messages=[user("hi")],
            max_completion_tokens=30,
            temperature=0,
            stream=True,
            **options,
            extra_body={"ignore_eos": True},
        )
    )
    ids = chat_ids(alone.tokenizer, [user("hi")])
    if usage:
        last = chunks.pop()
        assert last.choices == []
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(ids), 30)
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert [text] == alone.texts([ids], 30, ignore_eos=True)
    assert len(chunks) > 10, "in pieces"


def test_completions_take_text_and_ids(served: Served, alone: Alone) -> None:
    client = served.client()
    for prompt in ("some text", [1, 2, 3], ["some text"], [[1, 2, 3]]):
        ids = [1, 2, 3] if prompt in ([1, 2, 3], [[1, 2, 3]]) else alone.tokenizer.encode("some text")
        expected = alone.texts([ids], 12, temperature=1.0, seed=9, ignore_eos=True)
        options: dict[str, Any] = {
            "model": "toy",
            "prompt": prompt,
            "max_tokens": 12,
            "seed": 9,
            "extra_body": {"ignore_eos": True},
        }
        assert [client.completions.create(**options).choices[0].text] == expected
        pieces = [chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)]
        assert ["".join(pieces)] == expected


def test_stop_texts_are_not_shown(served: Served, alone: Alone) -> None:
    (whole,) = alone.texts([[7, 8]], 60, ignore_eos=True)
    stop = whole[10:13]
    for stream in (False, True):
        answer = served.client().completions.create(
            model="toy",
            prompt=[7, 8],
            max_tokens=60,
            temperature=0,
            stop=[stop, "never said"],
            stream=stream,
            extra_body={"ignore_eos": True},
        )
        choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
        assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_many_clients_each_hear_only_themselves(served: Served, alone: Alone) -> None:
    tokenizer = alone.tokenizer

    def one(number: int) -> tuple[list[str], list[str]]:
        chance = random.Random(number)
        client, named = served.client(), number % 2 == 0
        sampling: dict[str, Any] = {"temperature": chance.choice([0.0, 0.9]), "seed": number}
        turns = ["".join(chance.choices("abc äöü 🙂", k=chance.randint(1, 60))) for _ in range(3)]
        extra = {"ignore_eos": True, **({"conversation": f"n{number}"} if named else {})}
        said, prompts = [], []
        for i, turn in enumerate(turns):
            stream = chance.random() < 0.5
            answer = client.chat.completions.create(
                model="toy", messages=[user(turn)], max_tokens=25, stream=stream, extra_body=extra, **sampling
            )
            if stream:
                said.append("".join(c.choices[0].delta.content or "" for c in answer if c.choices))
            else:
                said.append(answer.choices[0].message.content)
            if named and i:
                prompts.append(tokenizer.encode_next(tokenizer.render_next_turn(turn)))
            else:
                prompts.append(chat_ids(tokenizer, [user(turn)]))
        options = {**sampling, "ignore_eos": True}
        if named:
            return said, alone.texts(prompts, 25, **options)
        return said, [alone.texts([prompt], 25, **options)[0] for prompt in prompts]

    with ThreadPoolExecutor(12) as pool:
        for said, expected in pool.map(one, range(24)):
            assert said == expected
    served.wait_idle()
    assert served.server.decode_loop.totals.conversations > 3


def lines_of(response: httpx.Response) -> Iterator[str]:
    """Lines that end in a line feed and nothing else: httpx's `iter_lines` cuts at every line end of Unicode."""
    rest = ""
    for piece in response.iter_text():
        *lines, rest = (rest + piece).split("\n")
        yield from lines


def ends_in_ascii(alone: Alone, ids: list[int]) -> tuple[int, str]:
    """A seed whose answer of two tokens is ASCII, so that its text gives the same ids again."""
    return next(
        (seed, text)
        for seed in range(200)
        if (text := alone.texts([ids], 2, temperature=1.0, seed=seed, ignore_eos=True)[0]).isascii() and len(text) == 2
    )


def test_a_chat_that_goes_on_feeds_only_what_is_new(served: Served, alone: Alone) -> None:
    client, first = served.client(), chat_ids(alone.tokenizer, [user("hi")])
    seed, text = ends_in_ascii(alone, first)

    def ask(messages: list[dict[str, str]]) -> Any:
        return client.chat.completions.create(
            model="toy", messages=messages, max_tokens=2, seed=seed, extra_body={"ignore_eos": True}
        )

    assert ask([user("hi")]).choices[0].message.content == text
    longer = [user("hi"), {"role": "assistant", "content": text}, user("and then?")]
    again = ask(longer)
    ids = chat_ids(alone.tokenizer, longer)
    assert again.usage.prompt_tokens == len(ids)
    assert again.usage.prompt_tokens_details.cached_tokens == len(first) + 2
    assert [again.choices[0].message.content] == alone.texts([ids], 2, temperature=1.0, seed=seed, ignore_eos=True)
    # Another past, as long and nearly the same, must not be taken for this one.
    other = [user("hj"), *longer[1:]]
    different = ask(other)
    assert different.usage.prompt_tokens_details.cached_tokens == 0
    other_ids = chat_ids(alone.tokenizer, other)
    assert [different.choices[0].message.content] == alone.texts(
        [other_ids], 2, temperature=1.0, seed=seed, ignore_eos=True
    )
    assert served.server.decode_loop.totals.reused_tokens == len(first) + 2


def test_the_token_that_ends_an_answer_is_fed_with_the_next_turn(
    served: Served, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = iter([*b"yes", EOS, *b"no", EOS])
    monkeypatch.setattr(Sampler, "sample", lambda *_: next(plan))
    client, messages = served.client(), [user("hi")]
    for text in ("yes", "no"):
        answer = client.chat.completions.create(model="toy", messages=messages)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text, "stop")
        messages += [{"role": "assistant", "content": text}, user("more")]
    whole = chat_ids(alone.tokenizer, messages[:3]) + list(b"no")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == len(chat_ids(alone.tokenizer, [user("hi")])) + 3
    positions = served.session.position.tolist()
    stream = positions.index(len(whole))
    assert served.session.recent_ids(stream).tolist() == whole[-served.session.capacity :]


def test_a_named_conversation_goes_on_for_ever(served: Served, alone: Alone) -> None:
    client, tokenizer, position = served.client(), alone.tokenizer, 0
    prompts = [chat_ids(tokenizer, [{"role": "system", "content": "S"}, user("one")])]
    prompts += [tokenizer.encode_next(tokenizer.render_next_turn(text)) for text in ("two", "three", "four")]
    expected = alone.texts(prompts, 15, ignore_eos=True)
    for i, text in enumerate(("one", "two", "three", "four")):
        messages = [*([] if i else [{"role": "system", "content": "S"}]), user(text)]
        answer = client.chat.completions.create(
            model="toy",
            messages=messages,
            max_tokens=15,
            temperature=0,
            extra_body={"conversation": "ada", "ignore_eos": True},
        )
        position += len(prompts[i]) + 15
        assert answer.choices[0].message.content == expected[i]
        assert answer.model_dump()["conversation"] == {"id": "ada", "position": position, "new": i == 0}
    assert position > 4 * served.session.capacity
    with pytest.raises(openai.BadRequestError, match="expected one user message"):
        client.chat.completions.create(model="toy", messages=[user("a"), user("b")], extra_body={"conversation": "ada"})
    delete = f"{served.url}/v1/conversations/ada"
    assert httpx.delete(delete).json() == {"id": "ada", "object": "conversation.deleted", "deleted": True}
    assert httpx.delete(delete).status_code == 404
    answer = client.chat.completions.create(
        model="toy", messages=[user("x")], max_tokens=1, extra_body={"conversation": "ada"}
    )
    assert answer.model_dump()["conversation"]["new"] is True


def test_completions_go_on_in_a_named_conversation(served: Served, alone: Alone) -> None:
    client, said = served.client(), []
    for text in ("abc", "def"):
        answer = client.completions.create(
            model="toy", prompt=text, max_tokens=6, temperature=0, extra_body={"conversation": "c", "ignore_eos": True}
        )
        said.append(answer.choices[0].text)
    assert said == alone.texts([alone.tokenizer.encode("abc"), alone.tokenizer.encode_next("def")], 6, ignore_eos=True)


def endless(served: Served, **extra: Any) -> Any:
    """An answer that would take hours."""
    return served.client().chat.completions.create(
        model="toy", messages=[user("go")], max_tokens=ENDLESS, stream=True, extra_body={"ignore_eos": True, **extra}
    )


def test_one_request_at_a_time_in_a_conversation(served: Served) -> None:
    stream = endless(served, conversation="busy")
    next(iter(stream))
    with pytest.raises(openai.ConflictError, match="at work"):
        served.client().chat.completions.create(model="toy", messages=[user("x")], extra_body={"conversation": "busy"})
    assert httpx.delete(f"{served.url}/v1/conversations/busy").status_code == 409
    stream.close()
    served.wait_idle()
    assert httpx.delete(f"{served.url}/v1/conversations/busy").status_code == 200


def test_clients_that_leave_are_cancelled(served: Served) -> None:
    totals = served.server.decode_loop.totals
    streams = [endless(served) for _ in range(5)]  # two of them wait, or take turns
    for stream in streams[:3]:
        next(iter(stream))
    served.wait_until(lambda: totals.running == 3 and totals.waiting >= 1)
    for stream in streams:
        stream.close()
    served.wait_idle()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{served.url}/v1/completions",
            timeout=0.5,
            json={"prompt": "go", "max_tokens": ENDLESS, "ignore_eos": True},
        )
    served.wait_idle()
    before = totals.answer_tokens
    time.sleep(0.2)
    assert totals.answer_tokens == before
    assert 'sinkexport_answers_total{reason="cancelled"} 6.0' in httpx.get(f"{served.url}/metrics").text


def test_a_cancelled_prompt_of_a_named_conversation_is_taken_with_the_next_one(
    served: Served, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client left while its message was being read: the stream must not lack half of it."""
    real, tokenizer, text = served.session.prefill, alone.tokenizer, "x" * 400
    once = {"messages": [user("?")], "max_tokens": 1}  # the first of all starts what renders templates
    assert httpx.post(f"{served.url}/v1/chat/completions", json=once, timeout=60).status_code == 200

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.02)
        return real(*arguments, **options)

    monkeypatch.setattr(served.session, "prefill", slow)
    body = {"messages": [user(text)], "conversation": "c", "ignore_eos": True, "temperature": 0, "max_tokens": 9}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/chat/completions", timeout=0.4, json=body)
    served.wait_idle()
    position = served.server.decode_loop.scheduler.position("named:c")
    first = chat_ids(tokenizer, [user(text)])
    assert 0 < position < len(first)
    monkeypatch.setattr(served.session, "prefill", real)
    answer = httpx.post(f"{served.url}/v1/chat/completions", json={**body, "messages": [user("next")]}).json()
    rest = tokenizer.encode_next(tokenizer.render_next_turn("next"))
    assert [answer["choices"][0]["message"]["content"]] == alone.texts([first + rest], 9, ignore_eos=True)
    assert answer["conversation"] == {"id": "c", "position": len(first) + len(rest) + 9, "new": False}


def test_a_client_that_takes_no_text_is_paused_and_given_up(many_bundle: Any, alone: Alone) -> None:
    limits = Limits(max_tokens=ENDLESS, grace_s=0, stall_s=1.5)
    with serving(many_bundle, limits, send_buffer=4096) as served:
        body = json.dumps({"prompt": "go", "max_tokens": ENDLESS, "ignore_eos": True, "stream": True}).encode()
        host, port = served.url.removeprefix("http://").split(":")
        totals = served.server.decode_loop.totals
        with socket.socket() as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.connect((host, int(port)))
            lazy.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
            responses = served.server.decode_loop.responses
            served.wait_until(lambda: any(response.paused for response in list(responses.values())))
            before = totals.answer_tokens
            (response,) = responses.values()
            assert response.queue.qsize() < 1000
            answer = served.client().completions.create(
                model="toy", prompt="x", max_tokens=5, temperature=0, extra_body={"ignore_eos": True}
            )
            assert [answer.choices[0].text] == alone.texts([alone.tokenizer.encode("x")], 5, ignore_eos=True)
            assert totals.answer_tokens - before <= 5 + 2
            served.wait_idle()  # given up after stall_s
        assert 'reason="stalled"} 1.0' in httpx.get(f"{served.url}/metrics").text


def test_a_slow_client_gets_everything(many_bundle: Any, alone: Alone) -> None:
    """Paused and resumed many times, and nothing is lost."""
    with serving(many_bundle, send_buffer=4096) as served:
        text = ""
        with httpx.stream(
            "POST",
            f"{served.url}/v1/completions",
            timeout=60,
            json={
                "prompt": "go",
                "max_tokens": 3000,
                "ignore_eos": True,
                "stream": True,
                "temperature": 0,
            },
        ) as response:
            for i, line in enumerate(lines_of(response)):
                if i % 500 == 0:
                    time.sleep(0.1)
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
        assert [text] == alone.texts([alone.tokenizer.encode("go")], 3000, ignore_eos=True)


def test_a_failure_reaches_its_client_and_no_other(
    served: Served, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, victim = served.session.step, ord("!")

    def step(ids: Any, streams: Any = None) -> Any:
        if victim in ids:
            raise BackendError("the device is gone")
        return real(ids, streams)

    monkeypatch.setattr(served.session, "step", step)
    results: dict[str, Any] = {}

    def ask(name: str, prompt: list[int], stream: bool) -> None:
        try:
            answer = served.client().completions.create(
                model="toy",
                prompt=prompt,
                max_tokens=300,
                temperature=0,
                stream=stream,
                logit_bias={},
                extra_body={"ignore_eos": True},
            )
            results[name] = "".join(c.choices[0].text for c in answer) if stream else answer.choices[0].text
        except openai.APIError as error:
            results[name] = error

    texts = {i: alone.texts([[i, 5]], 300, ignore_eos=True)[0] for i in range(60)}
    safe = next([i, 5] for i, text in texts.items() if "!" not in text)
    later = next([i, 5] for i, text in texts.items() if text.find("!") > 20)
    threads = [
        threading.Thread(target=ask, args=arguments)
        for arguments in (("whole", [victim], False), ("stream", later, True), ("safe", safe, True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(results["whole"], openai.InternalServerError)
    assert isinstance(results["stream"], openai.APIError)
    assert all("the device is gone" in str(results[name]) for name in ("whole", "stream"))
    assert [results["safe"]] == alone.texts([safe], 300, ignore_eos=True)
    assert httpx.get(f"{served.url}/health").status_code == 200


def test_a_decode_loop_that_dies_is_reported_to_everybody(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert httpx.get(f"{served.url}/health").json() == {"status": "ready"}
    stream = endless(served)
    next(iter(stream))

    def broken() -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(served.server.decode_loop.scheduler, "step", broken)
    with pytest.raises(openai.APIError, match="a bug"):
        list(stream)
    health = httpx.get(f"{served.url}/health")
    assert health.status_code == 503
    assert "a bug" in health.json()["reason"]
    response = httpx.post(f"{served.url}/v1/completions", json={"prompt": "x"})
    assert response.status_code == 503
    assert "retry-after" in response.headers
    assert "sinkexport_engine_up 0.0" in httpx.get(f"{served.url}/metrics").text


def test_stopping_ends_what_is_at_work(many_bundle: Any) -> None:
    with serving(many_bundle) as served:
        stream = endless(served)
        next(iter(stream))
        began = time.monotonic()
        served.server.stop()
        with pytest.raises((openai.APIError, httpx.RemoteProtocolError)):
            list(stream)
    assert time.monotonic() - began < 10
