"""Clients of OpenAI's library against `sinkexport serve` for minutes: nothing grows, nobody gets another's words.

    python benchmarks/soak_serve.py BUNDLE [--minutes 10] [--clients 8] [--json FILE]

Each client asks questions of its own, greedily, streamed or not by turns, in fresh conversations and in a named one
that goes on for the whole soak, and now and then leaves in the middle of an answer. A fresh answer must be the one that
the bundle gave to the same question at the start. The server's resident memory is sampled all the time; its growth is
from the second fifth of the time to the last, each by its median.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
from harness import environment, write_json

MIB = 2**20
TOKENS = 24
QUESTIONS = (
    "Name a colour.", "What is two plus two?", "Who wrote Hamlet?", "Say hello.", "What do bees make?",
    "Name the largest ocean.", "What is ice made of?", "Name a city in France.", "How many legs has a spider?",
    "What does a baker bake?", "Name a planet.", "What falls from clouds?",
)  # fmt: skip


class Server:
    """`sinkexport serve` as a process of its own."""

    def __init__(self, bundle: Path, threads: int | None) -> None:
        command = [sys.executable, "-m", "sinkexport.cli", "serve", str(bundle), "--port", "0"]
        self._process = subprocess.Popen(
            [*command, *(["--threads", str(threads)] if threads else [])], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found = re.match(r"Serving (.*) on (http://\S+)/v1 ", line)
        if found is None:
            raise SystemExit(f"the server did not start: {line}")
        self.model, self.url = found.groups()

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=5, timeout=300)

    def resident_bytes(self) -> int:
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def stop(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout=60)


class Soak:
    """Counts what the clients see."""

    def __init__(self, server: Server, end: float) -> None:
        self._server, self._end = server, end
        self._lock = threading.Lock()
        self.counts = {"answers": 0, "tokens": 0, "cancelled": 0, "named": 0, "mismatches": 0, "errors": 0}
        self.failures: list[str] = []
        self.expected = {question: self._ask(server.client(), question, stream=False) for question in QUESTIONS}

    def run(self, number: int) -> None:
        """One client."""
        client, turn = self._server.client(), number
        while time.monotonic() < self._end:
            turn += 1
            question = QUESTIONS[turn % len(QUESTIONS)]
            try:
                if turn % 7 == 0:
                    self._leave(client, question)
                elif turn % 5 == 0:
                    self._ask(client, question, conversation=f"client-{number}")
                    self._count(named=1)
                else:
                    answer = self._ask(client, question, stream=turn % 2 == 0)
                    if answer != self.expected[question]:
                        self._count(mismatches=1)
                        self.failures.append(f"{question!r}: {answer!r} for {self.expected[question]!r}")
                    self._count(answers=1)
            except openai.OpenAIError as error:
                self._count(errors=1)
                self.failures.append(str(error))

    def _ask(
        self, client: openai.OpenAI, question: str, *, stream: bool = False, conversation: str | None = None
    ) -> str:
        options: dict[str, Any] = {
            "model": self._server.model, "messages": [{"role": "user", "content": question}], "temperature": 0,
            "max_tokens": TOKENS, "extra_body": {"conversation": conversation} if conversation else {},
        }  # fmt: skip
        if not stream:
            reply = client.chat.completions.create(**options)
            self._count(tokens=reply.usage.completion_tokens)
            return reply.choices[0].message.content or ""
        text = ""
        for chunk in client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options):
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            if chunk.usage:
                self._count(tokens=chunk.usage.completion_tokens)
        return text

    def _leave(self, client: openai.OpenAI, question: str) -> None:
        stream = client.chat.completions.create(
            model=self._server.model, messages=[{"role": "user", "content": question}], stream=True, max_tokens=500
        )
        next(iter(stream))
        stream.close()
        self._count(cancelled=1)

    def _count(self, **numbers: int) -> None:
        with self._lock:
            for name, number in numbers.items():
                self.counts[name] += number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    server = Server(arguments.bundle, arguments.threads)
    start, seconds = time.monotonic(), arguments.minutes * 60
    soak = Soak(server, start + seconds)
    samples: list[tuple[float, int]] = []
    with ThreadPoolExecutor(arguments.clients) as pool:
        clients = [pool.submit(soak.run, number) for number in range(arguments.clients)]
        while not all(client.done() for client in clients):
            samples.append((time.monotonic() - start, server.resident_bytes()))
            time.sleep(1)
        for client in clients:
            client.result()
    code = server.stop()
    second, last = (
        statistics.median(rss for at, rss in samples if low <= at / seconds < low + 0.2) / MIB for low in (0.2, 0.8)
    )
    result = {
        "minutes": arguments.minutes, "clients": arguments.clients, **soak.counts,
        "rss_mib_second_fifth": second, "rss_mib_last_fifth": last, "growth_mib": last - second, "exit_code": code,
        "failures": soak.failures[:20],
        "rss_mib": [(round(at, 1), round(rss / MIB, 1)) for at, rss in samples[:: max(1, len(samples) // 100)]],
    }  # fmt: skip
    print(json.dumps({key: value for key, value in result.items() if key != "rss_mib"}, indent=1))
    if arguments.json:
        write_json(arguments.json, {**environment(arguments.threads or 0), **result})
    if soak.counts["errors"] or soak.counts["mismatches"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
