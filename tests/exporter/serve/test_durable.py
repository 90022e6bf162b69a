"""Named conversations of a server that is stopped, or killed: they go on where they were saved last."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sinkexport.serve.settings import Limits

from tests.exporter.serve.serving import serving
from tests.runtime.toy import Toy, build_toy
from tests.support import run_cli

LIMITS = Limits(max_tokens=10**6, grace_s=0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy(tmp_path_factory.mktemp("durable") / "toy", Toy(batch=2, chunk_size=16, window_size=100))


def ask(url: str, text: str, *, name: str = "ada", tokens: int = 20, key: str = "none") -> dict[str, object]:
    """One turn of a named conversation. Returns: its text, and what the server says of the conversation."""
    body = {
        "messages": [{"role": "user", "content": text}],
        "conversation": name,
        "max_tokens": tokens,
        "temperature": 0.8,
        "seed": 7,
        "ignore_eos": True,
    }
    answer = httpx.post(
        f"{url}/v1/chat/completions", json=body, timeout=60, headers={"Authorization": f"Bearer {key}"}
    ).json()
    assert "error" not in answer, answer
    return {"text": answer["choices"][0]["message"]["content"], **answer["conversation"]}


def position(url: str, name: str = "ada") -> int | None:
    """Tokens that a conversation has taken; None if the server has none of that name."""
    answer = httpx.get(f"{url}/v1/conversations/{name}")
    return None if answer.status_code == 404 else answer.json()["position"]


def test_a_server_that_was_stopped(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, LIMITS) as served:
        expected = [ask(served.url, text) for text in ("one", "two", "three")]
    got = []
    for text in ("one", "two", "three"):
        with serving(bundle, LIMITS, state_dir=tmp_path) as served:
            got.append(ask(served.url, text))
            assert position(served.url) == got[-1]["position"]
    assert got == expected
    assert [turn["new"] for turn in got] == [True, False, False]
    with serving(bundle, LIMITS, state_dir=tmp_path) as served:
        assert httpx.delete(f"{served.url}/v1/conversations/ada").status_code == 200
        assert position(served.url) is None
        assert httpx.delete(f"{served.url}/v1/conversations/ada").status_code == 404
    with serving(bundle, LIMITS, state_dir=tmp_path) as served:
        assert position(served.url) is None


def test_keys_have_their_own(bundle: Path, tmp_path: Path) -> None:
    keys = {"ada": "a" * 20, "bob": "b" * 20}
    with serving(bundle, LIMITS, api_key=keys, state_dir=tmp_path) as served:
        ask(served.url, "one", name="x", key="a" * 20)
    with serving(bundle, LIMITS, api_key=keys, state_dir=tmp_path) as served:
        assert ask(served.url, "two", name="x", key="b" * 20)["new"] is True
        assert ask(served.url, "two", name="x", key="a" * 20)["new"] is False


@contextlib.contextmanager
def process(bundle: Path, *options: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its URL."""
    command = [sys.executable, "-m", "sinkexport.cli", "serve", str(bundle), "--port", "0", *map(str, options)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        line = server.stderr.readline()
        found = re.search(r"(http://\S+?)/v1", line)
        assert found is not None, line + server.stderr.read()
        yield server, found[1]
    finally:
        server.kill()
        server.communicate()


def test_a_server_that_was_killed_in_the_middle_of_an_answer(bundle: Path, tmp_path: Path) -> None:
    options = ("--state-dir", tmp_path, "--save-every", 16, "--threads", 1)
    with process(bundle, *options) as (server, url):
        begun = ask(url, "one")
        other = ask(url, "one", name="bob")
        body = {"messages": [{"role": "user", "content": "go on"}], "conversation": "ada", "stream": True}
        body |= {"max_tokens": 4000, "ignore_eos": True}
        with (
            contextlib.suppress(httpx.HTTPError),
            httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer,
        ):
            for _ in answer.iter_lines():
                if (position(url) or 0) > int(str(begun["position"])) + 60:
                    os.kill(server.pid, signal.SIGKILL)
        server.wait(30)
    with process(bundle, *options) as (_, url):
        assert position(url, "bob") == other["position"]
        found = position(url)
        assert found is not None
        assert found > int(str(begun["position"])) + 16, "what was saved in the middle of the answer counts"
        turn = ask(url, "two")
        assert turn["new"] is False
        assert int(str(turn["position"])) > found
        assert ask(url, "two", name="bob")["text"] == expected_second(bundle)


def expected_second(bundle: Path) -> object:
    with serving(bundle, LIMITS) as served:
        ask(served.url, "one")
        return ask(served.url, "two")["text"]


def test_conversations_that_are_forgotten_come_back(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, Limits(max_tokens=100, grace_s=0, max_conversations=2), state_dir=tmp_path) as served:
        for i in range(5):
            ask(served.url, "one", name=f"c{i}")
            served.wait_idle()
        turns = [ask(served.url, "two", name=f"c{i}") for i in range(5)]
        assert [turn["new"] for turn in turns] == [False] * 5
        assert len({str(turn["text"]) for turn in turns}) == 1


def test_no_room_in_memory_is_the_servers_fault(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, LIMITS, state_dir=tmp_path) as served:
        ask(served.url, "one")
    with serving(bundle, Limits(max_tokens=100, grace_s=0, max_parked_bytes=0), state_dir=tmp_path) as served:
        answer = httpx.get(f"{served.url}/v1/conversations/ada")
        assert answer.status_code == 503
        assert "no memory for one more" in answer.json()["error"]["message"]
        assert httpx.delete(f"{served.url}/v1/conversations/ada").status_code == 200, "that needs no room"
        assert httpx.get(f"{served.url}/v1/conversations/ada").status_code == 404


def test_a_folder_that_cannot_be_written(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    run_cli("serve", bundle, "--port", 0, "--state-dir", tmp_path / "file").refusal(
        "folder for conversations: received"
    )
    run_cli("serve", bundle, "--save-every", 0).refusal("--save-every: received 0, expected >= 1")
