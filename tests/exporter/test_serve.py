"""The server, through OpenAI's own client library and through raw HTTP: nobody gets another's words."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import uvicorn
from click.testing import CliRunner
from sinkexport.cli import cli
from sinkexport.serve.app import ServerOptions, make_app
from sinkexport.serve.engine import Engine
from sinkrt import Session, UsageError

from tests.runtime.toy import Toy, build_toy

MANY, ONE = Toy(batch=3, chunk_size=4), Toy(batch=1, chunk_size=4)
KEY = "a-secret"


class Running:
    """A server in a thread, and clients for it."""

    def __init__(self, bundle: Path, *, max_waiting: int = 32, max_conversations: int = 40, **options: Any) -> None:
        self.session = Session.load(bundle, threads=1)
        self.engine = Engine(self.session, max_waiting=max_waiting, max_conversations=max_conversations)
        app = make_app(self.session, self.engine, ServerOptions("toy", **options))
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.key = options.get("api_key") or "none"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60)

    def http(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.key}", **options.pop("headers", {})}
        return httpx.request(method, self.url + path, headers=headers, timeout=60, **options)

    def metric(self, name: str) -> float:
        lines = self.http("GET", "/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"sinkexport_{name}"))

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=30)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("serve")
    return build_toy(folder / "many", MANY), build_toy(folder / "one", ONE)


@contextlib.contextmanager
def running(bundle: Path, **options: Any) -> Iterator[Running]:
    server = Running(bundle, **options)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(bundles: tuple[Path, Path]) -> Iterator[Running]:
    with running(bundles[0]) as server:
        yield server


def alone(bundle: Path, messages: list[dict[str, str]], **options: Any) -> str:
    """What a session of its own answers."""
    with Session.load(bundle, threads=1) as session:
        ids = session.tokenizer.encode(session.tokenizer.render_chat(messages), special=False)
        return "".join(session.generate(ids, **options))


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


CHAT: dict[str, Any] = {"model": "toy", "max_tokens": 24, "temperature": 0, "extra_body": {"ignore_eos": True}}


def streamed(client: openai.OpenAI, text: str, **options: Any) -> str:
    chunks = client.chat.completions.create(messages=user(text), stream=True, **{**CHAT, **options})
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_an_answer_is_that_of_a_session(server: Running, bundles: tuple[Path, Path]) -> None:
    want = alone(bundles[1], user("Hello"), max_tokens=24, ignore_eos=True)
    reply = server.client().chat.completions.create(messages=user("Hello"), **CHAT)
    assert reply.choices[0].message.content == want
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 24
    assert reply.usage.prompt_tokens == len("<bos>") - 4 + len("[user]Hello\n[assistant]") + 1
    assert streamed(server.client(), "Hello") == want


def test_sampling_is_that_of_a_session(server: Running, bundles: tuple[Path, Path]) -> None:
    options = {"temperature": 0.9, "top_p": 0.8, "seed": 11}
    want = alone(bundles[1], user("Hello"), max_tokens=24, ignore_eos=True, **options)
    assert streamed(server.client(), "Hello", **options) == want


def test_a_stream_tells_usage_if_asked(server: Running) -> None:
    chunks = list(
        server.client().chat.completions.create(
            messages=user("Hi"), stream=True, stream_options={"include_usage": True}, **CHAT
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24


def test_completions_of_text_and_of_ids(server: Running, bundles: tuple[Path, Path]) -> None:
    with Session.load(bundles[1], threads=1) as session:
        want = "".join(session.generate("Once", max_tokens=20, ignore_eos=True))
    client = server.client()
    options: dict[str, Any] = {**CHAT, "max_tokens": 20}
    for prompt in ("Once", ["Once"], list(b"Once"), [list(b"Once")]):
        assert client.completions.create(prompt=prompt, **options).choices[0].text == want  # type: ignore[arg-type]
    pieces = client.completions.create(prompt="Once", stream=True, **options)
    assert "".join(piece.choices[0].text for piece in pieces) == want


def test_stop_ends_before_the_text(server: Running, bundles: tuple[Path, Path]) -> None:
    whole = alone(bundles[1], user("Hello"), max_tokens=24, ignore_eos=True)
    stop = whole[7:9]
    reply = server.client().chat.completions.create(messages=user("Hello"), stop=[stop], **CHAT)
    assert reply.choices[0].message.content == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_thirty_clients_at_once_each_get_their_own(server: Running, bundles: tuple[Path, Path]) -> None:
    texts = [f"{i} {'long ' * (i % 7)}" for i in range(30)]
    want = [alone(bundles[1], user(text), max_tokens=24, ignore_eos=True) for text in texts]
    with ThreadPoolExecutor(30) as pool:
        got = list(pool.map(lambda text: streamed(server.client(), text), texts))
    assert got == want


def test_history_that_a_stream_holds_is_not_fed_again(server: Running, bundles: tuple[Path, Path]) -> None:
    client, before = server.client(), server.metric("reused_tokens_total")
    history = user("Tell me.")
    options = {**CHAT, "max_tokens": 5, "temperature": 0.7, "seed": 3}
    for turn in range(3):
        reply = client.chat.completions.create(messages=history, **options)
        answer = reply.choices[0].message.content or ""
        want = alone(bundles[1], history, max_tokens=5, ignore_eos=True, temperature=0.7, seed=3)
        assert reply.usage is not None
        reused = reply.usage.prompt_tokens_details
        assert reused is not None
        if "\ufffd" not in want and answer == want and turn and "\ufffd" not in history[-2]["content"]:
            assert reused.cached_tokens
        assert reply.usage.prompt_tokens > 8 * (turn + 1)
        assert answer == want
        history += [{"role": "assistant", "content": answer}, *user("More.")]
    assert server.metric("reused_tokens_total") >= before


def test_exactly_the_ids_of_a_stream_are_reused(server: Running) -> None:
    """By ids, where no text stands between: the second prompt is the first, its answer and something new."""
    client = server.client()
    first = list(b"A beginning that nobody else has")
    with Session.load(build_toy(Path(server.session._bundle).parent / "again", ONE), threads=1) as session:
        session.prefill(first)
        answer = []
        for _ in range(9):
            answer.append(int(session.logits[0].argmax()))
            session.step([answer[-1]])
        session.prefill(list(b"Go on"))
        want = int(session.logits[0].argmax())
        options = {**CHAT, "max_tokens": 9}
        client.completions.create(prompt=first, **options)
        reply = client.completions.create(prompt=[*first, *answer, *b"Go on"], **{**CHAT, "max_tokens": 1})
        assert reply.usage is not None
        assert reply.usage.prompt_tokens_details is not None
        assert reply.usage.prompt_tokens_details.cached_tokens == len(first) + 9
        assert reply.usage.prompt_tokens == len(first) + 9 + 5
        assert reply.choices[0].text == session.tokenizer.streaming_decoder().push(want) or want > 127


def test_a_named_conversation_takes_only_what_is_new(server: Running, bundles: tuple[Path, Path]) -> None:
    client = server.client()
    with Session.load(bundles[1], threads=1) as session:
        tokenizer = session.tokenizer
        first = tokenizer.encode(tokenizer.render_chat(user("One")), special=False)
        second = tokenizer.encode_next(tokenizer.render_next_turn("Two"))
        want = ["".join(session.generate(ids, max_tokens=24, ignore_eos=True)) for ids in (first, second)]
    body = {"ignore_eos": True, "conversation": "ada"}
    replies = [
        client.chat.completions.create(messages=user(text), **{**CHAT, "extra_body": body}) for text in ("One", "Two")
    ]
    assert [reply.choices[0].message.content for reply in replies] == want
    extra = [reply.model_extra or {} for reply in replies]
    assert [e["conversation"] for e in extra] == [{"id": "ada", "new": True}, {"id": "ada", "new": False}]
    assert server.http("DELETE", "/v1/conversations/ada").json()["deleted"] is True
    assert server.http("DELETE", "/v1/conversations/ada").status_code == 404
    again = client.chat.completions.create(messages=user("One"), **{**CHAT, "extra_body": body})
    assert again.choices[0].message.content == want[0]


def test_a_named_conversation_answers_one_at_a_time(server: Running) -> None:
    client = server.client()
    options = {**CHAT, "max_tokens": 1000, "extra_body": {"ignore_eos": True, "conversation": "busy"}}
    stream = client.chat.completions.create(messages=user("One"), stream=True, **options)
    next(iter(stream))
    with pytest.raises(openai.ConflictError):
        client.chat.completions.create(messages=user("Two"), **options)
    stream.close()


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_client_that_leaves_frees_its_stream(bundles: tuple[Path, Path]) -> None:
    with running(bundles[0], max_tokens=10**9) as server:
        options = {**CHAT, "max_tokens": 10**9}
        stream = server.client().chat.completions.create(messages=user("For ever"), stream=True, **options)
        for _, _ in zip(range(5), stream, strict=False):
            pass
        assert server.engine.load.running == 1
        stream.close()
        wait_until(lambda: server.engine.load.running == 0)
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        body = {"model": "toy", "messages": user("For ever"), "max_tokens": 10**9, "ignore_eos": True}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        wait_until(lambda: server.engine.load.running == 1)
        connection.close()
        wait_until(lambda: server.engine.load.running == 0)
        assert server.metric("cancelled_total") == 2


def test_too_many_are_told_to_come_back(bundles: tuple[Path, Path]) -> None:
    with running(bundles[0], max_waiting=2, max_tokens=10**9) as server:
        options = {**CHAT, "max_tokens": 10**9}
        client = server.client()
        streams = [client.chat.completions.create(messages=user(str(i)), stream=True, **options) for i in range(5)]
        wait_until(lambda: server.engine.load.running + server.engine.load.waiting == 5)
        with pytest.raises(openai.RateLimitError) as caught:
            server.client().chat.completions.create(messages=user("one more"), **options)
        assert caught.value.response.headers["retry-after"] == "1"
        for stream in streams:
            stream.close()
        wait_until(lambda: server.engine.load.running + server.engine.load.waiting == 0)
        assert server.client().chat.completions.create(messages=user("now"), **CHAT).choices


def test_a_key_is_asked_for(bundles: tuple[Path, Path]) -> None:
    with running(bundles[0], api_key=KEY) as server:
        assert server.client().models.list().data[0].id == "toy"
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}):
            reply = httpx.get(f"{server.url}/v1/models", headers=headers)
            assert reply.status_code == 401
            assert reply.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{server.url}/health").status_code == 200


CHAT_BODY: dict[str, Any] = {"model": "toy", "messages": user("Hi")}
LONG = "x" * 70_000


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("chat/completions", b"{", 400, ""),
        ("chat/completions", b"\xff\xfe", 400, ""),
        ("chat/completions", b"[]", 400, ""),
        ("chat/completions", {}, 400, "model"),
        ("chat/completions", {"model": "toy", "messages": []}, 400, "messages"),
        ("chat/completions", {"model": "toy", "messages": [{"role": "pirate", "content": "a"}]}, 400, "role"),
        ("chat/completions", {"model": "toy", "messages": [{"role": "user"}]}, 400, "content"),
        ("chat/completions", {"model": "toy", "messages": [{"role": "user", "content": 5}]}, 400, "content"),
        ("chat/completions", {**CHAT_BODY, "model": "gpt"}, 404, "gpt"),
        ("chat/completions", {**CHAT_BODY, "n": 2}, 400, "n"),
        ("chat/completions", {**CHAT_BODY, "max_tokens": 0}, 400, "max_tokens"),
        ("chat/completions", {**CHAT_BODY, "max_tokens": "5"}, 400, "max_tokens"),
        ("chat/completions", {**CHAT_BODY, "temperature": -1}, 400, "temperature"),
        ("chat/completions", {**CHAT_BODY, "temperature": float("inf")}, 400, "temperature"),
        ("chat/completions", {**CHAT_BODY, "top_p": 0}, 400, "top_p"),
        ("chat/completions", {**CHAT_BODY, "seed": -1}, 400, "seed"),
        ("chat/completions", {**CHAT_BODY, "presence_penalty": 0.5}, 400, "presence_penalty"),
        ("chat/completions", {**CHAT_BODY, "tools": []}, 400, "tools"),
        ("chat/completions", {**CHAT_BODY, "stop": [""]}, 400, "stop"),
        ("chat/completions", {**CHAT_BODY, "stop": ["a"] * 50}, 400, "stop"),
        ("chat/completions", {**CHAT_BODY, "conversation": ""}, 400, "conversation"),
        ("chat/completions", {"model": "toy", "messages": user("\ud800")}, 400, ""),
        ("chat/completions", {"model": "toy", "messages": user("x" * 3000)}, 400, "tokens"),
        ("chat/completions", {"model": "toy", "messages": user(LONG)}, 413, "bytes"),
        ("completions", {"model": "toy", "prompt": ""}, 400, "tokens"),
        ("completions", {"model": "toy", "prompt": []}, 400, "tokens"),
        ("completions", {"model": "toy", "prompt": ["a", "b"]}, 400, "prompt"),
        ("completions", {"model": "toy", "prompt": [1, 999]}, 400, "token id"),
        ("completions", {"model": "toy", "prompt": [-1]}, 400, "token id"),
        ("completions", {"model": "toy", "prompt": "a", "echo": True}, 400, "echo"),
        ("nowhere", {}, 404, ""),
    ],
    ids=str,
)  # fmt: skip
def test_bad_requests_are_told_why(limited: Running, path: str, body: Any, status: int, words: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = limited.http("POST", f"/v1/{path}", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def limited(bundles: tuple[Path, Path]) -> Iterator[Running]:
    with running(bundles[0], max_body_bytes=65_536, max_prompt_tokens=2000) as server:
        yield server


def test_a_body_without_length_is_limited_too(limited: Running) -> None:
    reply = limited.http("POST", "/v1/completions", content=(b"x" * 1024 for _ in range(100)))
    assert reply.status_code == 413


def test_other_methods_and_models(limited: Running) -> None:
    assert limited.http("GET", "/v1/chat/completions").status_code == 405
    assert limited.http("GET", "/v1/models/toy").json()["id"] == "toy"
    assert limited.http("GET", "/v1/models/other").status_code == 404


def test_metrics_tell_what_happened(limited: Running) -> None:
    before = limited.metric("answer_tokens_total")
    limited.client().chat.completions.create(messages=user("Hi"), **CHAT)
    assert limited.metric("answer_tokens_total") == before + 24
    text = limited.http("GET", "/metrics").text
    assert 'sinkexport_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert "sinkexport_engine_up 1.0" in text
    assert limited.metric("resident_bytes") > 1e6


def test_a_dead_engine_says_so(bundles: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with running(bundles[0]) as server:
        assert server.http("GET", "/health").json() == {"status": "ok", "reason": None}

        def broken() -> Any:
            raise MemoryError("none left")

        monkeypatch.setattr(server.engine._scheduler, "step", broken)
        for _ in range(2):
            with pytest.raises(openai.InternalServerError) as caught:
                server.client().chat.completions.create(messages=user("Hi"), **CHAT)
            assert caught.value.status_code == 503
        reply = server.http("GET", "/health")
        assert reply.status_code == 503
        assert "none left" in reply.json()["reason"]


def test_a_message_that_the_sinks_do_not_keep_is_refused_if_asked(bundles: tuple[Path, Path]) -> None:
    with running(bundles[0], pin_system=True) as server:
        messages = [{"role": "system", "content": "Be brief."}, *user("Hi")]
        with pytest.raises(openai.BadRequestError, match="--sink-tokens 25"):
            server.client().chat.completions.create(messages=messages, **CHAT)  # type: ignore[arg-type]
        assert server.client().chat.completions.create(messages=user("Hi"), **CHAT).choices


def test_a_short_soak_neither_grows_nor_mixes(bundles: tuple[Path, Path]) -> None:
    texts = [f"client {i}" for i in range(8)]
    want = {text: alone(bundles[1], user(text), max_tokens=24, ignore_eos=True) for text in texts}
    with running(bundles[0], max_conversations=9) as server, ThreadPoolExecutor(8) as pool:

        def talk(seconds: float) -> int:
            end = time.monotonic() + seconds

            def one(text: str) -> int:
                client, count = server.client(), 0
                while time.monotonic() < end:
                    assert streamed(client, text) == want[text]
                    count += 1
                return count

            return sum(pool.map(one, texts))

        talk(4)
        before = psutil.Process().memory_info().rss
        assert talk(8) > 20
        assert psutil.Process().memory_info().rss - before < 16 * 2**20  # clients and server share this process


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--host", "0.0.0.0"), "without an API key"),
        (("--host", "10.1.2.3"), "without an API key"),
        (("--port", "70000"), "--port"),
        (("--max-tokens", "0"), "--max-tokens"),
        (("--host", "127.0.0.1", "--port", "PORT"), "address"),
        (("--api-key-file", "EMPTY"), "which is empty"),
    ],
)
def test_bad_options_are_one_line(
    bundles: tuple[Path, Path], server: Running, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "empty").write_text("\n")
    filled = [{"PORT": str(server.port), "EMPTY": str(tmp_path / "empty")}.get(a, a) for a in arguments]
    result = CliRunner().invoke(cli, ["serve", str(bundles[0]), *filled])
    assert result.exit_code != 0
    message = str(result.exception) if isinstance(result.exception, UsageError) else result.output
    assert words in message
