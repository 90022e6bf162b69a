"""A real server in a thread for tests, and what each conversation should hear: the same in a session of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import openai
import pytest
from sinkexport.serve.server import Server
from sinkexport.serve.settings import Limits, listen
from sinkrt import Session
from sinkrt.text import Tokenizer

from tests.runtime.toy import Toy, build_toy

MANY, ONE = Toy(batch=3, chunk_size=4), Toy(batch=1, chunk_size=4)
ENDLESS = 10**7
LIMITS = Limits(max_tokens=ENDLESS, grace_s=0)


@dataclasses.dataclass(frozen=True)
class Served:
    """A running server."""

    server: Server
    session: Session
    url: str

    def client(self, key: str = "none") -> openai.OpenAI:
        """A client that does not try again: errors are what tests look for."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        """Wait for what the engine's thread will do soon."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it never came true"
            time.sleep(0.01)

    def wait_idle(self) -> None:
        totals = self.server.decode_loop.totals
        self.wait_until(lambda: totals.running == totals.waiting == 0)


@contextlib.contextmanager
def serving(
    bundle: Path,
    limits: Limits = LIMITS,
    *,
    api_key: str | Mapping[str, str] | None = None,
    pin_system: bool = False,
    allow_special: bool = False,
    prefix_dir: Path | None = None,
    state_dir: Path | None = None,
    send_buffer: int | None = None,
) -> Iterator[Served]:
    with listen("127.0.0.1", 0) as listener, Session.load(bundle, threads=1) as session:
        if send_buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # connections inherit it
        keys = {"default": api_key} if isinstance(api_key, str) else api_key
        options = {"pin_system": pin_system, "allow_special": allow_special}
        server = Server(session, limits, api_keys=keys, prefix_dir=prefix_dir, state_dir=state_dir, **options)
        thread = threading.Thread(target=server.run, args=(listener,))
        thread.start()
        try:
            served = Served(server, session, f"http://127.0.0.1:{listener.getsockname()[1]}")
            served.wait_until(lambda: server.started)
            yield served
        finally:
            server.stop()
            thread.join(timeout=30)
            assert not thread.is_alive()


class Alone:
    """What a bundle of one stream says to the same requests."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle

    def texts(self, prompts: list[list[int]], max_tokens: int, **options: object) -> list[str]:
        """The answers to prompts that follow each other in one stream."""
        with Session.load(self.bundle, threads=1, verify=False) as session:
            return [
                "".join(session.generate(prompt, max_tokens=max_tokens, **options))  # type: ignore[arg-type]
                for prompt in prompts
            ]

    @property
    def tokenizer(self) -> Tokenizer:
        with Session.load(self.bundle, threads=1, verify=False) as session:
            return session.tokenizer


@pytest.fixture(scope="session")
def many_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy(tmp_path_factory.mktemp("serve") / "many", MANY)


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return Alone(build_toy(tmp_path_factory.mktemp("serve") / "one", ONE))


@pytest.fixture
def served(many_bundle: Path) -> Iterator[Served]:
    with serving(many_bundle) as served:
        yield served


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def chat_ids(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    return tokenizer.encode(tokenizer.render_chat(messages), special=False)
