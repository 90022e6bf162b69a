"""What a request may hold: nulls, echoed messages, fields without effect; and that nothing that is sent gives a 500."""

from __future__ import annotations

import json
import random
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from sinkexport.serve.body import MAX_DEPTH, parse
from sinkexport.serve.requests import ChatRequest, CompletionRequest, ResponsesRequest, TokenizeRequest, refused
from sinkexport.serve.settings import Limits
from sinkrt.sampler import Sampler

from tests.exporter.serve.serving import Served, many_bundle, serving, user

__all__ = ["many_bundle"]  # a fixture
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
"""All that str.splitlines takes for the end of a line."""


@pytest.fixture(scope="module")
def served(many_bundle: Path) -> Iterator[Served]:
    with serving(many_bundle, Limits(max_prompt_tokens=2000, max_tokens=60, grace_s=0)) as served:
        yield served


def send(served: Served, body: Any, path: str = CHAT) -> httpx.Response:
    content = body if isinstance(body, (str, bytes)) else json.dumps(body)
    return httpx.post(served.url + path, content=content, headers={"Content-Type": "application/json"}, timeout=30)


def message_of(response: httpx.Response, status: int = 400) -> str:
    assert response.status_code == status, response.text
    message = response.json()["error"]["message"]
    assert message
    assert message.isprintable()
    return str(message)


def text_of(served: Served, body: dict[str, Any], path: str = CHAT) -> str:
    response = send(served, {"temperature": 0, "max_tokens": 5, **body}, path)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return str(choice["message"]["content"] if path == CHAT else choice["text"])


@pytest.mark.parametrize(("kind", "path"), [(ChatRequest, CHAT), (CompletionRequest, COMPLETIONS)])
def test_a_null_is_an_absent_field(served: Served, kind: Any, path: str) -> None:
    needed = {"messages": [user("hi")]} if path == CHAT else {"prompt": "hi"}
    nulls = dict.fromkeys([*kind.model_fields, "audio", "functions", "reasoning_effort", "web_search_options"])
    body = {**nulls, **needed, "temperature": 0, "max_tokens": 5}
    assert text_of(served, body, path) == text_of(served, needed, path)
    for name in needed:
        assert "expected" in message_of(send(served, {**needed, name: None}, path))


def test_echoed_messages_of_the_official_client(served: Served) -> None:
    client, history = served.client(), [user("hi")]
    for _ in range(3):
        answer = client.chat.completions.create(model="toy", messages=history, max_tokens=3, temperature=0)
        dumped = answer.choices[0].message.model_dump()
        assert dumped["tool_calls"] is None
        history += [dumped, user("go on")]
    short = [{"role": m["role"], "content": m["content"]} for m in history]
    assert text_of(served, {"messages": history}) == text_of(served, {"messages": short})
    more = {"annotations": [], "audio": None, "function_call": None, "tool_calls": [], "refusal": None, "name": None}
    assert text_of(served, {"messages": [{**m, **more} for m in short]}) == text_of(served, {"messages": short})


def test_an_assistant_may_have_said_nothing(served: Served) -> None:
    silent = [user("a"), {"role": "assistant", "content": ""}, user("b")]
    for said in ({"role": "assistant", "content": None}, {"role": "assistant"}):
        assert text_of(served, {"messages": [silent[0], said, silent[2]]}) == text_of(served, {"messages": silent})


HARMLESS: dict[str, Any] = {
    "metadata": {"a": "b"},
    "store": True,
    "user": "ada",
    "service_tier": "auto",
    "safety_identifier": "x",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "stream_options": {"include_usage": True},
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
}
HARMLESS_CHAT: dict[str, Any] = {
    "parallel_tool_calls": True,
    "logprobs": False,
    "top_logprobs": 0,
    "tools": [],
    "tool_choice": "auto",
    "function_call": "none",
    "functions": [],
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "prediction": {"type": "content", "content": "x"},
    "verbosity": "medium",
}


def test_what_changes_nothing_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "sinkexport.serve"):
        parse(b'{"prompt": "hi", "user": "ada", "store": null, "n": 1, "seed": 5}', CompletionRequest)
        parse(b'{"prompt": "hi"}', CompletionRequest)
    assert [record.getMessage() for record in caplog.records] == ["taken and not used: user"]


def test_unknown_fields_are_ignored_and_named_in_the_log(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    message = {**user("hi"), "colour": 1, "cache_control": {"type": "ephemeral"}}
    parts = [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}, "shape": None}]
    body = {"messages": [message, user("there") | {"content": parts}], "frobnicate": 1, "x\u2028y": [2], "y": None}
    plain = {"messages": [user("hi"), user("hi")]}
    with caplog.at_level("DEBUG", "sinkexport.serve"):
        assert text_of(served, body) == text_of(served, plain)
    (line,) = {record.getMessage() for record in caplog.records if "unknown" in record.getMessage()}
    assert line == (
        'ignored, since unknown: "frobnicate", "messages.cache_control", "messages.colour", '
        '"messages.content.cache_control", "x\\u2028y"'
    )
    many = {"prompt": "hi", **{f"a{i}": 0 for i in range(50_000)}}
    with caplog.at_level("DEBUG", "sinkexport.serve"):
        assert text_of(served, many, COMPLETIONS) == text_of(served, {"prompt": "hi"}, COMPLETIONS)
    assert max(len(record.getMessage()) for record in caplog.records) < 1000


def test_all_fields_of_requests_are_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
    kinds = (ChatRequest, CompletionRequest, ResponsesRequest, TokenizeRequest)
    names = {*refused.REFUSED, *(name for kind in kinds for name in kind.model_fields)}
    assert {name for name in names if not re.search(rf"[`\"]{name}[`\".]", text)} == set()


def test_refused_fields_are_taken_with_values_that_ask_for_nothing(served: Served) -> None:
    for kind, path, needed in (
        (ChatRequest, CHAT, {"messages": [user("hi")]}),
        (CompletionRequest, COMPLETIONS, {"prompt": "hi"}),
    ):
        harmless = {
            name: found.harmless[0]
            for name, found in refused.REFUSED.items()
            if found.harmless and name not in kind.model_fields
        }
        assert text_of(served, {**needed, **harmless}, path) == text_of(served, needed, path)


def test_what_changes_nothing_is_taken(served: Served) -> None:
    chat, completion = {"messages": [user("hi")]}, {"prompt": "hi"}
    assert text_of(served, {**chat, **HARMLESS, **HARMLESS_CHAT}) == text_of(served, chat)
    more = {"echo": False, "best_of": 1, "suffix": ""}
    assert text_of(served, {**completion, **HARMLESS, **more}, COMPLETIONS) == text_of(served, completion, COMPLETIONS)


REFUSED = [
    ("stop", 5, "stop: received 5, expected a text of 1 .. 1024 characters, or a list of at most 16 such texts"),
    ("stop", ["a", 5], "stop: received 5, expected a text"),
    ("stop", [""], "stop: received a text of 0 characters, expected a text"),
    ("stop", ["a"] * 17, "stop: received 17 texts, expected a text"),
    ("messages", "hi", 'messages: received "hi", expected a list of messages'),
    ("messages", [5], "messages.0: received 5, expected an object"),
    ("messages", [{"role": "tool", "content": "x"}], "messages.0: tool_call_id: expected with the role tool"),
    ("messages", [{"role": "function", "content": "x"}], 'messages.0.role: received "function", expected system,'),
    (
        "messages",
        [{"role": "tool", "content": "x", "tool_call_id": "a"}],
        "messages: received a message of the role tool",
    ),
    ("messages", [{"role": "user"}], "messages.0.content: received nothing, expected a text, or a list of parts"),
    ("messages", [{"role": "user", "content": None}], "messages.0.content: received null, expected a text"),
    ("messages", [{"role": "user", "content": 5}], "messages.0.content: received 5, expected a text, or a list"),
    (
        "messages",
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        'messages.0.content.0.type: received "image_url", expected "text": pictures',
    ),
    (
        "messages",
        [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        "messages.0.content.0.text: received 5, expected a text",
    ),
    (
        "messages",
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}],
        "messages.0.tool_calls.0.function: received nothing, expected an object with a name and arguments",
    ),
    ("messages", [{"role": "assistant", "refusal": "no"}], 'messages.0.refusal: received "no", expected null'),
    ("tools", [{"type": "function"}], "tools.0.function: received nothing, expected an object with a name"),
    ("tools", [{"type": "custom", "custom": {}}], 'tools.0.type: received "custom", expected "function": other tools'),
    ("tool_choice", {"type": "function"}, "tool_choice: received an object of 1, expected"),
    ("tool_choice", "required", "tool_choice: received 'required', expected with tools"),
    ("response_format", {"type": "json"}, 'response_format.type: received "json", expected "text", "json_object" or'),
    ("n", 4, "n: received 4, expected at most 3, the streams of this server"),
    ("n", 0, "n: received 0, expected an integer from 1 to the number of streams of this server"),
    ("logprobs", 1, "logprobs: received 1, expected true or false"),
    ("top_logprobs", 5, "top_logprobs: received 5, expected with logprobs true"),
    ("logit_bias", {"five": 1}, 'logit_bias: received "five", expected an object of numbers from -100 to 100 by token'),
    ("logit_bias", {"5": 101}, "logit_bias.5: received 101, expected an object of numbers from -100 to 100"),
    ("logit_bias", {"258": 1}, "logit_bias: received token 258, expected 0 .. 257"),
    ("frequency_penalty", 2.5, "frequency_penalty: received 2.5, expected a number from -2 to 2"),
    ("min_p", 0.1, "min_p: other ways to choose tokens are not implemented here; leave it out"),
    ("stop_token_ids", [5], "stop_token_ids: stops by token id are not implemented here; use stop, which takes names"),
    ("repeat_penalty", 1.1, "repeat_penalty: llama.cpp's penalties are not implemented here; use repetition_penalty"),
    ("guided_json", {"type": "object"}, "guided_json: other names of an answer's form are not implemented here"),
    ("enable_thinking", False, "enable_thinking: other ways to ask for reasoning are not implemented here; use chat_t"),
    ("max_new_tokens", 5, "max_new_tokens: other names of an answer's longest length are not implemented here"),
    ("continue_final_message", True, "continue_final_message: other ways to make a prompt of messages are not"),
    ("temperature", "hot", 'temperature: received "hot", expected a number from 0 to 2'),
    ("temperature", 10**400, "temperature: received a huge number, expected a number from 0 to 2"),
    ("repetition_penalty", 1e-300, "repetition_penalty: received 1e-300, expected a number from 0.01 to 100"),
    ("top_k", True, "top_k: received true, expected an integer from 0"),
    ("seed", 2**64, "seed: received 18446744073709551616, expected an integer from -2^63 to 2^64 - 1"),
    ("stream", "yes", 'stream: received "yes", expected true or false'),
    ("stream_options", [], "stream_options: received an empty list, expected an object"),
    ("stream_options", {"include_usage": 1}, "stream_options.include_usage: received 1, expected true or false"),
    ("audio", {"voice": "x"}, "audio: answers in sound are not implemented here; leave it out"),
    ("reasoning_effort", "low", "reasoning_effort: levels of reasoning are not implemented here"),
    ("web_search_options", {}, "web_search_options: web searches are not implemented here"),
    ("\ud800", 1, "body: a \\u escape is half a character"),
    ("model", "a\n\x00\u202e" * 50, "does not exist"),
    ("conversation", "a\n", "conversation: received"),
]


REFUSED_IDS = [f"{name[:20]!a}-{i}" for i, (name, *_) in enumerate(REFUSED)]


@pytest.mark.parametrize(("name", "value", "words"), REFUSED, ids=REFUSED_IDS)
def test_refusals_name_the_field_and_what_is_expected(served: Served, name: str, value: Any, words: str) -> None:
    body = {"messages": [user("hi")], name: value}
    message = message_of(send(served, body), 404 if name == "model" else 400)
    assert words in message
    for jargon in ("constrained", "Input should", "[", "pydantic", "str,"):
        assert jargon not in message.replace('["text"]', "")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (5, "received 5, expected one text, or one list"),
        ([1, "a"], 'received "a" among the ids'),
        ([1.5], "received 1.5 among the ids"),
        ([-1], "received -1"),
        ([True], "received true"),
        ([2**70], "received 1"),
        (["a", "b"], "received 2 prompts, expected one text"),
        ([[1], [2]], "received 2 prompts"),
        ({}, "an empty object"),
        ([["a"]], 'received "a" among'),
        (None, "expected one text"),
    ],
)
def test_refused_prompts(served: Served, prompt: Any, words: str) -> None:
    message = message_of(send(served, {"prompt": prompt}, COMPLETIONS))
    assert message.startswith("prompt: ")
    assert words in message


BODIES: list[tuple[bytes, str]] = [
    (b"", "received nothing"),
    (b" \n", "received nothing"),
    (b"{", "no JSON"),
    (b"[]", "received an empty list, expected a JSON object"),
    (b"5", "received 5, expected a JSON object"),
    (b'{"prompt": "a", "prompt": "b"}', 'key "prompt" is there twice'),
    (b'{"prompt": "a", "metadata": {"a": 1, "a": 1}}', 'key "a" is there twice'),
    (b"[" * 100_000, "nested deeper"),
    (b'{"a":' * 100_000, "nested deeper"),
    (b'{"prompt": "a", "metadata": {"a": ' + b"[" * 100 + b"]" * 100 + b"}}", "nested deeper"),
    (b'{"prompt": "a", "max_tokens": ' + b"9" * 10_000 + b"}", "too many digits"),
    (b'{"prompt": "a", "temperature": ' + b"9" * 4000 + b"}", "received a huge number"),
    (b'{"prompt": "a", "seed": ' + b"-" + b"9" * 4000 + b"}", "received a huge number"),
    (b'{"prompt": "a", "temperature": 1e999}', "temperature: received Infinity"),
    (b'{"prompt": "a", "temperature": NaN}', "NaN is no JSON"),
    (b'{"prompt": "a", "temperature": -Infinity}', "-Infinity is no JSON"),
    (b'{"prompt": "\xff"}', "byte 12 is no UTF-8"),
    (b'{"prompt": "\xed\xa0\x80"}', "is no UTF-8"),
    (b'\xef\xbb\xbf{"prompt": "a"}', "no JSON"),
    ('{"prompt": "a"}'.encode("utf-16"), "is no UTF-8"),
    (b'{"prompt": "\\ud800"}', "half a character"),
    (b'{"prompt": "a", "metadata": {"\\udc00": 1}}', "half a character"),
    (b'{"prompt": "a"} x', "no JSON"),
    (b'{"prompt": "a\n"}', "no JSON"),
    (json.dumps({"prompt": [0.5] * 200_000}).encode(), "prompt: received 0.5 among"),
    (json.dumps({"messages": [0] * 300_000}).encode(), "messages.0: received 0"),
    (json.dumps({"prompt": 5, **{f"a{i}": 0 for i in range(50_000)}}).encode(), "prompt: received 5"),
]


@pytest.mark.parametrize(("content", "words"), BODIES, ids=range(len(BODIES)))
def test_bodies_that_are_no_strict_json(served: Served, content: bytes, words: str) -> None:
    path = CHAT if content.startswith(b'{"messages') else COMPLETIONS
    assert words in message_of(send(served, content, path))


def test_whole_surrogate_pairs_and_some_depth_are_fine(served: Served) -> None:
    deep: Any = 1
    for _ in range(MAX_DEPTH - 2):
        deep = [deep]
    pair = json.dumps({"prompt": "🙂", "temperature": 0, "metadata": {"a": deep}})
    assert "\\ud83d" in pair
    assert send(served, pair, COMPLETIONS).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({"Content-Type": 'Application/JSON;charset="UTF-8"'}, 200),
        ({"Content-Type": "application/json; charset=latin-1"}, 415),
        ({"Content-Type": "application/jsonp"}, 415),
        ({"Content-Type": "text/plain"}, 415),
        ({}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": "identity"}, 200),
    ],
)
def test_content_types(served: Served, headers: dict[str, str], status: int) -> None:
    content = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    assert httpx.post(served.url + COMPLETIONS, content=content, headers=headers).status_code == status


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/toy", "/metrics"])
def test_head_and_other_methods(served: Served, path: str) -> None:
    head = httpx.head(served.url + path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == httpx.get(served.url + path).headers["content-type"]
    for method in ("OPTIONS", "POST", "PUT", "PATCH", "DELETE"):
        response = httpx.request(method, served.url + path)
        message_of(response, 405)
        assert set(response.headers["allow"].split(", ")) == {"GET", "HEAD"}
        assert not any(name.startswith("access-control") for name in response.headers)


def test_methods_of_the_other_routes_and_unknown_paths(served: Served) -> None:
    for path, allowed in (
        (CHAT, "POST"),
        (COMPLETIONS, "POST"),
        ("/v1/responses", "POST"),
        ("/tokenize", "POST"),
        ("/v1/conversations/x", "DELETE, GET, HEAD"),
        ("/v1/responses/x", "DELETE, GET, HEAD"),
    ):
        for method in ("OPTIONS", "GET", "HEAD") if "GET" not in allowed else ("OPTIONS", "POST"):
            response = httpx.request(method, served.url + path)
            assert (response.status_code, response.headers["allow"]) == (405, allowed)
    for path in (
        "/page",
        "/v1",
        "/v1/models/",
        "/health/",
        "/docs",
        "/openapi.json",
        "/v1/chat/completions/",
        "//health",
    ):
        message_of(httpx.get(served.url + path), 404)


def test_event_streams_are_one_line_for_every_reader(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that split with str.splitlines see whole events."""
    text = "a".join(LINE_ENDS)
    plan = iter([*text.encode(), 257])
    monkeypatch.setattr(Sampler, "sample", lambda *_: next(plan))
    raw = send(served, {"messages": [user("x")], "stream": True}).text
    lines, said = raw.splitlines(), ""
    assert lines == raw.split("\n")[:-1]
    for line in lines:
        assert not line or line.startswith("data: ")
        if line.startswith("data: {"):
            said += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
    assert said == text


def test_what_sampling_refuses_leaves_the_conversation_as_it_was(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(**more: Any) -> httpx.Response:
        body = {"messages": [user("hi")], "conversation": "kept", "temperature": 0, "ignore_eos": True, "max_tokens": 5}
        return send(served, {**body, **more})

    position = ask().json()["conversation"]["position"]
    for wrong in ({"repetition_penalty": 1e-300}, {"temperature": 10**400}, {"top_p": 0}, {"seed": 2**80}):
        message_of(ask(**wrong))
    loop = served.server.decode_loop
    assert loop.scheduler.position("named:kept") == position

    def broken(*_: Any) -> int:
        raise FloatingPointError("a bug\nin sampling")

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "sample", broken)
        assert "FloatingPointError: a bug in sampling" in message_of(ask(), 500)
    taken = loop.scheduler.position("named:kept")
    assert taken > position, "the message was taken"
    after = ask().json()["conversation"]
    assert (after["new"], after["position"] > taken) == (False, True)


def some_json(chance: random.Random, depth: int = 0) -> Any:
    simple: list[Any] = [
        None,
        True,
        False,
        0,
        1,
        -1,
        1.5,
        1e308,
        -0.0,
        10**400,
        2**63,
        "",
        "x",
        "auto",
        "\u2028",
        "\x00",
        "a" * 2000,
        [],
        {},
    ]
    if depth > 2 or chance.random() < 0.7:
        return chance.choice(simple)
    if chance.random() < 0.5:
        return [some_json(chance, depth + 1) for _ in range(chance.randint(0, 3))]
    names = ["type", "text", "role", "content", "include_usage", "name", "x"]
    return {chance.choice(names): some_json(chance, depth + 1) for _ in range(chance.randint(0, 3))}


@pytest.mark.parametrize("seed", range(2))
def test_random_bodies_never_give_a_500(served: Served, seed: int) -> None:
    chance = random.Random(seed)
    kinds = (ChatRequest, CompletionRequest, ResponsesRequest, TokenizeRequest)
    names = [*(name for kind in kinds for name in kind.model_fields), "audio", "x", "\u2029"]
    statuses = []
    with httpx.Client(base_url=served.url, timeout=30) as client:
        for _ in range(400):
            body: dict[str, Any] = {"max_tokens": 1, "messages": [user("hi")]}
            path = chance.choice([CHAT, COMPLETIONS, "/v1/responses", "/tokenize"])
            if path == COMPLETIONS:
                body = {"max_tokens": 1, "prompt": "hi"}
            elif path == "/v1/responses":
                body = {"max_output_tokens": 1, "input": [user("hi")]}
            for _ in range(chance.randint(0, 3)):
                body[chance.choice(names)] = some_json(chance)
            if chance.random() < 0.3 and path == CHAT:
                body["messages"] = [
                    {
                        "role": chance.choice(["user", "assistant", "system", "tool"]),
                        chance.choice(["content", "name"]): some_json(chance),
                    }
                ]
            elif chance.random() < 0.3 and path == "/v1/responses":
                item = {chance.choice(["role", "content", "id", "summary"]): some_json(chance)}
                kind = chance.choice(["message", "reasoning", "item_reference", "x"])
                body["input"] = [{"type": kind, "role": "user", "content": "x", **item}]
            response = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
            assert response.status_code < 500, (body, response.text)
            if response.status_code != 200:
                message_of(response, response.status_code)
            statuses.append(response.status_code)
    assert statuses.count(200) > 20
    assert statuses.count(400) > 50


def test_penalties_at_their_limits_are_served(served: Served) -> None:
    for value in (0.01, 100, np.nextafter(0.01, 1)):
        for temperature in (0, 5e-324, 2):
            body = {"messages": [user("hi")], "repetition_penalty": value, "temperature": temperature, "top_p": 5e-324}
            assert send(served, body).status_code == 200


def test_answers_do_not_wait_for_acknowledgements(served: Served) -> None:
    with httpx.Client(base_url=served.url) as client:
        client.get("/health")
        connections = list(served.server.connections)
        assert connections
        for connection in connections:
            raw = connection.transport.get_extra_info("socket")
            assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
