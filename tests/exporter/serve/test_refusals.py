"""What a server refuses: everything malformed, oversized, unknown or not allowed gets 4xx in OpenAI's form."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from sinkexport.serve.keys import read_api_keys
from sinkexport.serve.settings import Limits, check_exposure, listen
from sinkrt import UsageError

from tests.exporter.serve.serving import ENDLESS, Served, many_bundle, serving, user

__all__ = ["many_bundle"]  # a fixture
KEY = "sk-test-1234"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LIMITS = Limits(max_waiting=2, max_prompt_tokens=200, max_tokens=ENDLESS, max_body_bytes=4096, grace_s=0)


@pytest.fixture(scope="module")
def strict(many_bundle: Path) -> Iterator[Served]:
    with serving(many_bundle, LIMITS) as served:
        yield served


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert "\n" not in body["error"]["message"]
    return dict(body["error"])


MESSAGES = [user("hi")]
BAD_CHATS: dict[str, Any] = {
    "messages": [{}, {"messages": []}, {"messages": None}, {"messages": "hi"}, {"messages": [1]}, {"messages": [[]]}],
    "messages.0.role": [{"messages": [{"role": role, "content": "x"}]} for role in ("function", "robot", "", None, 3)],
    "messages.0.content": [
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    ],
    "max_tokens": [{"messages": MESSAGES, "max_tokens": value} for value in (0, -1, 1.5, "5", ENDLESS + 1, 10**400)],
    "max_completion_tokens": [{"messages": MESSAGES, "max_completion_tokens": 0}],
    "temperature": [
        {"messages": MESSAGES, "temperature": value} for value in (-0.1, 2.1, "1", [], True, 1e300, 10**400)
    ],
    "top_p": [{"messages": MESSAGES, "top_p": value} for value in (0, 1.1)],
    "top_k": [{"messages": MESSAGES, "top_k": value} for value in (-1, 2**31, 0.5)],
    "repetition_penalty": [
        {"messages": MESSAGES, "repetition_penalty": value}
        for value in (0, -1, 101, 1e-300, 5e-324, 1e-9, 1e300, 10**400)
    ],
    "seed": [{"messages": MESSAGES, "seed": value} for value in (2**64, -(2**63) - 1, "x")],
    "n": [{"messages": MESSAGES, "n": value} for value in (0, 4, "1", 1.5, 129)],
    "frequency_penalty": [{"messages": MESSAGES, "frequency_penalty": value} for value in (2.5, -2.5, "1")],
    "presence_penalty": [{"messages": MESSAGES, "presence_penalty": value} for value in (2.1, [])],
    "logit_bias": [
        {"messages": MESSAGES, "logit_bias": value}
        for value in ({"5": 101}, {"x": 1}, {"-1": 1}, {"258": 1}, {"5": "1"}, [1], {"": 0}, {"5": True}, {"05": 1})
    ],
    "logprobs": [{"messages": MESSAGES, "logprobs": value} for value in (1, "yes")],
    "top_logprobs": [
        {"messages": MESSAGES, "logprobs": True, "top_logprobs": 21},
        {"messages": MESSAGES, "top_logprobs": 2},
        {"messages": MESSAGES, "logprobs": True, "top_logprobs": -1},
    ],
    "tools": [{"messages": MESSAGES, "tools": [{"type": "function"}]}],
    "response_format.type": [{"messages": MESSAGES, "response_format": {"type": "json"}}],
    "stream": [{"messages": MESSAGES, "stream": "yes"}],
    "stop": [{"messages": MESSAGES, "stop": value} for value in ("", [""], ["x"] * 17, "x" * 1025, 5)],
    "conversation": [{"messages": MESSAGES, "conversation": value} for value in ("", "a/b", "x" * 65, 5)],
    "stream_options": [{"messages": MESSAGES, "stream_options": {"include_usage": 1}}],
    "min_p": [{"messages": MESSAGES, "min_p": 0.1}],
    "guided_json": [{"messages": MESSAGES, "guided_json": {"type": "object"}}],
}
CASES = [(param, body) for param, bodies in BAD_CHATS.items() for body in bodies]


@pytest.mark.parametrize(("param", "body"), CASES, ids=[f"{p}-{i}" for i, (p, _) in enumerate(CASES)])
def test_malformed_chats(strict: Served, param: str, body: dict[str, Any]) -> None:
    content = json.dumps(body)
    response = httpx.post(strict.url + CHAT, content=content, headers={"Content-Type": "application/json"})
    error = refusal(response, 400)
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[0] in error["message"] or error["param"] is None


@pytest.mark.parametrize(
    "prompt", [None, "", [], [""], [[]], ["a", "b"], [[1], [2]], [-1], [258], [2**70], [1.5], [True, "a"], {}, 5]
)
def test_malformed_prompts(strict: Served, prompt: Any) -> None:
    refusal(httpx.post(strict.url + COMPLETIONS, json={"prompt": prompt, "max_tokens": 1}), 400)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"5",
        b'"x"',
        b"\xff\xfe",
        b"{}" * 2,
        b"[" * 2000,
        b'{"a":' * 600,
        b'{"messages": [{"role": "user", "content": NaN}]}',
        b'{"prompt": "\\ud800", "max_tokens": 1}',
        b'{"temperature": NaN, "prompt": "x"}',
        b'{"temperature": 1e999, "prompt": "x"}',
        b'{"prompt": "x", "max_tokens": ' + b"9" * 3000 + b"}",
    ],
    ids=range(15),
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_bodies_that_are_no_requests(strict: Served, content: bytes, path: str) -> None:
    refusal(httpx.post(strict.url + path, content=content, headers={"Content-Type": "application/json"}), 400)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_other_content_types(strict: Served, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    refusal(httpx.post(strict.url + COMPLETIONS, content=b'{"prompt": "x"}', headers=headers), 415)


def test_oversized_bodies(strict: Served) -> None:
    body = json.dumps({"prompt": "x" * 5000}).encode()
    headers = {"Content-Type": "application/json"}
    assert refusal(httpx.post(strict.url + COMPLETIONS, content=body, headers=headers), 413)["code"]

    def pieces(count: int) -> Iterator[bytes]:
        yield from (body[:500] for _ in range(count))

    refusal(httpx.post(strict.url + COMPLETIONS, content=pieces(20), headers=headers), 413)  # no Content-Length
    with socket.create_connection(strict.url.removeprefix("http://").split(":")) as raw:  # type: ignore[arg-type]
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413 ")
    with socket.create_connection(strict.url.removeprefix("http://").split(":")) as raw:  # type: ignore[arg-type]
        lengths = b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" + lengths)
        answer = b"".join(iter(lambda: raw.recv(1000), b""))  # which ends, since the server closes
        assert answer.startswith(b"HTTP/1.1 400 ") and b"received both" in answer
    refusal(httpx.post(strict.url + COMPLETIONS, json={"prompt": "x" * 201}), 400)
    code = refusal(httpx.post(strict.url + CHAT, json={"messages": [user("x" * 201)]}), 400)["code"]
    assert code == "context_length_exceeded"
    assert httpx.post(strict.url + COMPLETIONS, json={"prompt": "x" * 190, "max_tokens": 1}).status_code == 200


def test_unknown_things(strict: Served) -> None:
    assert refusal(httpx.get(strict.url + "/v1/nothing"), 404)
    assert refusal(httpx.get(strict.url + CHAT), 405)
    assert refusal(httpx.delete(strict.url + "/v1/conversations/nobody"), 404)["code"] == "conversation_not_found"
    assert refusal(httpx.get(strict.url + "/v1/models/gpt-9"), 404)["code"] == "model_not_found"
    error = refusal(httpx.post(strict.url + COMPLETIONS, json={"prompt": "x", "model": "gpt-9"}), 404)
    assert error["param"] == "model"
    assert [model.id for model in strict.client().models.list()] == ["toy"]
    assert strict.client().models.retrieve("toy").id == "toy"
    metrics = httpx.get(strict.url + "/metrics").text
    assert 'route="other",status="404"' in metrics
    assert "/v1/nothing" not in metrics, "anybody can invent paths"


def test_too_many_requests_are_turned_away_and_tried_again(strict: Served) -> None:
    """Three streams and two that wait; OpenAI's client tries again after a 429."""
    body: dict[str, Any] = {
        "model": "toy",
        "prompt": "x",
        "max_tokens": ENDLESS,
        "stream": True,
        "extra_body": {"ignore_eos": True},
    }
    streams = [strict.client().completions.create(**body) for _ in range(5)]
    response = httpx.post(strict.url + COMPLETIONS, json={"prompt": "x"})
    assert refusal(response, 429)["type"] == "rate_limit_error"
    assert int(response.headers["retry-after"]) >= 1
    with pytest.raises(openai.RateLimitError):
        strict.client().completions.create(model="toy", prompt="x")
    for stream in streams:
        stream.close()
    patient = openai.OpenAI(base_url=f"{strict.url}/v1", api_key="none", max_retries=3)
    assert patient.completions.create(model="toy", prompt="x", max_tokens=1).choices
    strict.wait_idle()


def test_a_refused_request_leaves_nothing_behind(strict: Served) -> None:
    """Slots come back after every kind of refusal: else the server would be full forever."""
    for _ in range(20):
        httpx.post(strict.url + COMPLETIONS, json={"prompt": [300]})
        httpx.post(strict.url + COMPLETIONS, json={"prompt": ""})
        httpx.post(strict.url + COMPLETIONS, json={"prompt": "x" * 201})
    assert httpx.post(strict.url + COMPLETIONS, json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_the_key(many_bundle: Path) -> None:
    with serving(many_bundle, LIMITS, api_key=KEY) as served:
        headers = [
            {},
            {"Authorization": KEY},
            {"Authorization": f"Basic {KEY}"},
            {"Authorization": "Bearer"},
            {"Authorization": f"Bearer {KEY}5"},
            {"Authorization": b"Bearer \xff\xfe"},
        ]
        for given in headers:
            for path in ("/v1/models", "/metrics", "/nothing"):
                response = httpx.get(served.url + path, headers=given)  # type: ignore[arg-type]
                assert refusal(response, 401)["code"] == "invalid_api_key"
        big = httpx.post(served.url + COMPLETIONS, content=b"x" * 10_000)
        refusal(big, 401)  # before anything is read
        assert httpx.get(served.url + "/health").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            served.client("wrong").models.list()
        assert served.client(KEY).models.list().data[0].id == "toy"
        assert served.client(KEY).completions.create(model="toy", prompt="x", max_tokens=1).choices


def test_a_system_message_that_the_sinks_do_not_keep_is_refused_if_asked(many_bundle: Path) -> None:
    with serving(many_bundle, pin_system=True) as served:
        ask = served.client().chat.completions.create
        for role in ("system", "developer"):
            messages: Any = [{"role": role, "content": "Be brief."}, user("Hi")]
            with pytest.raises(openai.BadRequestError, match="--sink-tokens 25"):
                ask(model="toy", messages=messages, max_tokens=1)
        assert ask(model="toy", messages=[user("Hi")], max_tokens=1).choices  # type: ignore[list-item]


def test_metrics_show_what_happened(many_bundle: Path) -> None:
    with serving(many_bundle) as served:
        client = served.client()
        client.completions.create(model="toy", prompt=[1] * 40, max_tokens=7, extra_body={"ignore_eos": True})
        client.completions.create(model="toy", prompt=[2] * 10, max_tokens=5, extra_body={"ignore_eos": True})
        refusal(httpx.post(served.url + COMPLETIONS, json={"prompt": 5}), 400)
        served.wait_idle()
        text = httpx.get(served.url + "/metrics").text
    values = {name: float(value) for name, value in re.findall(r"^(\S+) (\S+)$", text, re.MULTILINE)}
    assert values['sinkexport_requests_total{route="/v1/completions",status="200"}'] == 2
    assert values['sinkexport_requests_total{route="/v1/completions",status="400"}'] == 1
    assert values["sinkexport_prompt_tokens_total"] == 50
    assert values["sinkexport_answer_tokens_total"] == 12
    assert values['sinkexport_answers_total{reason="length"}'] == 2
    for name in ("queue_seconds", "time_to_first_token_seconds", "time_per_output_token_seconds"):
        assert values[f"sinkexport_{name}_count"] == 2
        assert values[f"sinkexport_{name}_sum"] > 0
    assert values["sinkexport_running_conversations"] == values["sinkexport_waiting_conversations"] == 0
    assert values["sinkexport_conversations"] == 2
    assert values["sinkexport_resident_memory_bytes"] > 10 * 2**20
    assert values["sinkexport_engine_up"] == 1


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_the_network_needs_a_key(host: str) -> None:
    with pytest.raises(UsageError, match="without an API key"):
        check_exposure(host, has_key=False)
    check_exposure(host, has_key=True)
    check_exposure("127.0.0.1", has_key=False)
    check_exposure("localhost", has_key=False)


def test_names_of_others_are_no_way_in(strict: Served) -> None:
    """DNS rebinding: a web page's own name that points here."""
    for host in (
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "[::1].evil.example",
        "[::1]evil.example",
        "[::1]:80.evil.example",
        "[::1",
        "::1",
        "[127.0.0.1]",
        "localhost:80@evil.example",
        "evil.example@localhost",
        "localhost:evil.example",
        "localhost:",
        "localhost:99999",
        "localhost.",
        "127.0.0.1.",
        ".localhost",
        "a..localhost",
        "evil.example/localhost",
        "127.0.0.1:8000:9",
        "127.1",
        "0177.0.0.1",
        "[fe80::1%25eth0]",
        "localhost, evil.example",
        "local host",
        "evil.example\tlocalhost",
        "-.localhost",
    ):
        assert refusal(httpx.get(strict.url + "/v1/models", headers={"Host": host}), 403)["type"] == "permission_error"
    for host in (
        "localhost",
        "LOCALHOST:80",
        "127.0.0.1:5",
        "[::1]:8000",
        "[::1]",
        "192.168.1.7",
        "a.localhost",
        "A.B.LocalHost:1",
    ):
        assert httpx.get(strict.url + "/v1/models", headers={"Host": host}).status_code == 200


def test_serving_needs_no_torch() -> None:
    code = "import sys, sinkexport.serve.server; assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_keys_are_read_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"  {KEY}\n")
    assert read_api_keys(file, "other") == {"default": KEY}
    assert read_api_keys(None, KEY) == {"default": KEY}
    assert read_api_keys(None, None) is None
    for bad in ("", " \n", "two words", "schlüssel"):
        file.write_text(bad, encoding="utf-8")
        with pytest.raises(UsageError, match="API key"):
            read_api_keys(file, None)
    with pytest.raises(UsageError, match="--api-key-file"):
        read_api_keys(tmp_path / "missing", None)


def test_a_port_that_is_taken() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(UsageError, match="--port"):
        listen("127.0.0.1", taken.getsockname()[1])


def command(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sinkexport.cli", "serve", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--host", "0.0.0.0"), "without an API key"),
        (("--host", "no.such.host.invalid"), "--host"),
        (("--max-tokens", 0), "--max-tokens"),
        (("--max-waiting", -1), "--max-waiting"),
        (("--api-key-file", "/no/such/file"), "--api-key-file"),
        (("--port", 99999), "--port"),
    ],
)
def test_bad_options_are_one_line(many_bundle: Path, arguments: tuple[Any, ...], words: str) -> None:
    process = command(many_bundle, "--port", 0, *arguments)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_and_ends_in_an_orderly_way(many_bundle: Path, number: signal.Signals) -> None:
    process = command(many_bundle, "--port", 0, "--threads", 1, "--model-name", "my-toy", SINKEXPORT_API_KEY=KEY)
    assert process.stderr is not None
    first = process.stderr.readline()
    try:
        url = re.search(r"http://\S+?/v1", first)
        assert url is not None, first
        client = openai.OpenAI(base_url=url[0], api_key=KEY, max_retries=5)
        assert client.models.list().data[0].id == "my-toy"
        stream = client.completions.create(
            model="my-toy", prompt="x", max_tokens=4096, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        process.send_signal(number)
        pieces = [chunk.choices[0] for chunk in stream if chunk.choices]
        assert pieces[-1].finish_reason == "length", "what is at work may end"
        began = time.monotonic()
        _, err = process.communicate(timeout=30)
        assert time.monotonic() - began < 15
        assert (process.returncode, err) == (0, "Stopped.\n")
    finally:
        process.kill()
        process.communicate()
