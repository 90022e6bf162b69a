"""Does a server stay right and small for as long as clients talk to it?

    python benchmarks/soak_serve.py BUNDLE --minutes 10 --clients 6 --json soak.json

Starts ``sinkexport serve`` and lets clients of OpenAI's library play scripts against it: chats that resend all of their
messages, named conversations, completions, streamed or not, with sampling. Some leave in the middle, some send
nonsense. The right answers were computed before, one conversation at a time, on a session of its own.

Exit code 0: every answer was right, every refusal was a 4xx, no request was lost, memory did not grow; else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import harness
import httpx
import openai
import psutil
from sinkexport.bench.machine import physical_cores
from sinkexport.bench.timing import Stats
from sinkrt import Session
from sinkrt.answer import AnswerParams
from sinkrt.sampler import SamplingParams
from sinkrt.scheduler import Scheduler

WORDS = ["the", "sea", "a", "storm", "king", "who", "why", "tell", "me", "war", "Ἰθάκη,", "straße", "東京", "🙂"]
WARM_UP = 0.25
"""Share of the time after which memory must not grow any more: until then conversations pile up to their limit."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One request and its right answers: of a stream that took all of it, or of one that went on from before.

    The two differ only where a sum in another order tips the balance between two tokens.
    """

    messages: list[dict[str, str]]
    answers: set[str]


@dataclasses.dataclass(frozen=True)
class Script:
    """What a client says. kind: chat, named or completion."""

    kind: str
    sampling: dict[str, Any]
    max_tokens: int
    turns: list[Turn]


class Tally:
    """What happened, of all clients together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.first_token_s: list[float] = []

    def add(self, **counts: int) -> None:
        with self._lock:
            self.counts.update(counts)

    def wrong(self, kind: str, what: str) -> None:
        with self._lock:
            self.counts[kind] += 1
            if len(self.problems) < 20:
                self.problems.append(what[:500])


def write_scripts(bundle: Path, count: int, threads: int | None) -> list[Script]:
    """Scripts with their right answers, each from a scheduler with nothing else to do."""
    chance, scripts = random.Random(0), []
    with Session.load(bundle, threads=threads) as session:
        for number in range(count):
            show(f"computing what is right: script {number + 1} of {count}")
            scripts.append(_write_script(session, chance, ("chat", "named", "completion")[number % 3], number))
    return scripts


def _write_script(session: Session, chance: random.Random, kind: str, number: int) -> Script:
    tokenizer, max_tokens = session.tokenizer, chance.randint(4, 24)
    sampling: dict[str, Any] = {"temperature": chance.choice([0.0, 0.8]), "top_p": 0.95, "seed": number}
    scheduler, turns = Scheduler(session), []
    messages: list[dict[str, str]] = []
    for i in range(1 if kind == "completion" else 3):
        message = {"role": "user", "content": " ".join(chance.choices(WORDS, k=chance.choice([3, 10, 60])))}
        if kind == "completion":
            texts = [tokenizer.encode(message["content"])]
        elif kind == "named":
            texts = [
                tokenizer.encode_next(tokenizer.render_next_turn(message["content"]))
                if i
                else tokenizer.encode(tokenizer.render_chat([message]), special=False)
            ]
        else:
            messages = [*messages, message]
            texts = [tokenizer.encode(tokenizer.render_chat(messages), special=False)]
        answers = []
        if kind == "chat":
            if earlier := scheduler.find_start(texts[0]):
                rest = texts[0][scheduler.position(earlier) :]
                answers.append(_say(scheduler, earlier, rest, sampling, max_tokens))
            answers.append(_say(scheduler, f"fresh {i}", texts[0], sampling, max_tokens))
        else:
            answers.append(_say(scheduler, "it", texts[0], sampling, max_tokens))
        turns.append(Turn(messages if kind == "chat" else [message], set(answers)))
        messages = [*messages, {"role": "assistant", "content": answers[-1]}]
    return Script(kind, sampling, max_tokens, turns)


def _say(scheduler: Scheduler, name: str, ids: list[int], sampling: dict[str, Any], max_tokens: int) -> str:
    scheduler.submit(name, ids, SamplingParams(**sampling), AnswerParams(max_tokens))
    text = ""
    while scheduler.has_work:
        text += "".join(event.text for event in scheduler.step())
    return text


class Player:
    """One client: plays random scripts until `stop` is set."""

    def __init__(self, number: int, url: str, model: str, scripts: list[Script], tally: Tally) -> None:
        self._number = number
        self._chance = random.Random(1000 + number)
        self._url = url
        self._client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)
        self._model = model
        self._scripts = scripts
        self._tally = tally
        self._plays = 0

    def run(self, until: float) -> None:
        while time.monotonic() < until:
            try:
                if self._chance.random() < 0.1:
                    self._talk_nonsense()
                else:
                    self._play(self._chance.choice(self._scripts))
            except Exception as error:
                self._tally.wrong("errors", f"{type(error).__name__}: {error}")

    def _play(self, script: Script) -> None:
        self._plays += 1
        extra = {"conversation": f"soak-{self._number}-{self._plays}"} if script.kind == "named" else {}
        for turn in script.turns:
            leave = self._chance.random() < 0.1
            text = self._ask(script, turn, extra, leave)
            if text is None:
                return  # a conversation that was cut short has no right answer any more
            if text not in turn.answers:
                self._tally.wrong("mismatches", f"{script.kind} {turn.messages}: {text!r}, not {turn.answers}")
        if extra and self._chance.random() < 0.5:  # the others are left for the server to forget
            httpx.delete(f"{self._url}/conversations/{extra['conversation']}").raise_for_status()

    def _ask(self, script: Script, turn: Turn, extra: dict[str, str], leave: bool) -> str | None:
        """The answer's text; None if the client has left on purpose."""
        stream = leave or self._chance.random() < 0.6
        options = {
            "model": self._model,
            "max_tokens": script.max_tokens,
            "stream": stream,
            "extra_body": extra,
            **script.sampling,
        }
        self._tally.add(requests=1)
        began, text, tokens = time.perf_counter(), "", 0
        if script.kind == "completion":
            answer = self._client.completions.create(prompt=turn.messages[0]["content"], **options)
        else:
            answer = self._client.chat.completions.create(messages=turn.messages, **options)
        if not stream:
            self._tally.add(
                answers=1,
                answer_tokens=answer.usage.completion_tokens,
                reused_tokens=answer.usage.prompt_tokens_details.cached_tokens,
            )
            choice = answer.choices[0]
            return choice.text if script.kind == "completion" else choice.message.content
        with answer:
            for chunk in answer:
                choice = chunk.choices[0]
                piece = choice.text if script.kind == "completion" else choice.delta.content
                if piece and not text:
                    self._tally.first_token_s.append(time.perf_counter() - began)
                tokens += 1
                text += piece or ""
                if leave and tokens >= 3:
                    self._tally.add(left=1)
                    return None
        self._tally.add(answers=1)
        return text

    def _talk_nonsense(self) -> None:
        body, expected = self._chance.choice(
            [
                ("{", 400),
                ("[]", 400),
                ('{"messages": []}', 400),
                ('{"prompt": 5, "messages": 5}', 400),
                (json.dumps({"messages": [{"role": "user", "content": "x" * 2_000_000}]}), 413),
                ('{"model": "other", "messages": [{"role": "user", "content": "x"}]}', 404),
            ]
        )
        headers = {"Content-Type": "application/json"}
        response = httpx.post(f"{self._url}/chat/completions", content=body, headers=headers, timeout=300)
        self._tally.add(refused=1)
        if response.status_code != expected:
            self._tally.wrong("errors", f"{body[:60]}: {response.status_code}, not {expected}")


@contextlib.contextmanager
def served(
    bundle: Path, threads: int | None, max_conversations: int, options: Sequence[str] = ()
) -> Iterator[tuple[psutil.Process, str]]:
    """A server process and its URL. Raises: RuntimeError if it does not start or does not end well."""
    command = [
        sys.executable,
        "-m",
        "sinkexport.cli",
        "serve",
        str(bundle),
        "--port",
        "0",
        "--max-conversations",
        str(max_conversations),
        *options,
    ]
    command += [] if threads is None else ["--threads", str(threads)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.search(r"http://\S+?/v1", line)
        if found is None:
            raise RuntimeError(f"the server did not start: {line}{process.stderr.read()}")
        yield psutil.Process(process.pid), found[0]
        process.terminate()
        _, rest = process.communicate(timeout=60)
        if process.returncode or "Traceback" in rest:
            raise RuntimeError(f"the server ended with {process.returncode}: {rest[-2000:]}")
    finally:
        process.kill()
        process.wait()


def show(text: str) -> None:
    """Show how far it is, in one line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)


def gauge(url: str, name: str) -> float:
    text = httpx.get(url.removesuffix("/v1") + "/metrics").text
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else float("nan")


def soak(bundle: Path, minutes: float, clients: int, scripts: int, threads: int | None) -> dict[str, Any]:
    """Everything that was measured, as JSON; see the names."""
    plays = write_scripts(bundle, scripts, threads)
    tally, memory_mb, began = Tally(), [], time.monotonic()
    with served(bundle, threads, max_conversations=3 * clients) as (process, url):
        model = openai.OpenAI(base_url=url, api_key="none", max_retries=9).models.list().data[0].id
        began = time.monotonic()
        until = began + 60 * minutes
        players = [Player(i, url, model, plays, tally) for i in range(clients)]
        workers = [threading.Thread(target=player.run, args=(until,)) for player in players]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            time.sleep(min(5.0, 60 * minutes / 40))
            memory_mb.append((round(time.monotonic() - began, 1), round(process.memory_info().rss / 1e6, 1)))
            show(f"{memory_mb[-1][0]:6.0f} s  {memory_mb[-1][1]:7.1f} MB  {dict(tally.counts)}")
        for _ in range(50):
            at_work = gauge(url, "sinkexport_running_conversations") + gauge(url, "sinkexport_waiting_conversations")
            if not at_work:
                break
            time.sleep(0.1)
        totals = {name: gauge(url, f"sinkexport_{name}_tokens_total") for name in ("prompt", "reused", "answer")}
    seconds = time.monotonic() - began
    steady = [mb for at, mb in memory_mb if at >= WARM_UP * 60 * minutes]
    third = max(1, len(steady) // 3)
    growth = statistics.median(steady[-third:]) - statistics.median(steady[:third])
    waits = Stats.of([1e3 * wait for wait in tally.first_token_s]) if tally.first_token_s else None
    return {
        "environment": harness.environment(threads or physical_cores()),
        "bundle": bundle.name,
        "clients": clients,
        "scripts": scripts,
        "seconds": round(seconds, 1),
        **{name: tally.counts[name] for name in ("requests", "answers", "left", "refused", "errors", "mismatches")},
        "server_tokens": totals,
        "tokens_per_s": round(totals["answer"] / seconds, 1),
        "time_to_first_piece_ms": None if waits is None else dataclasses.asdict(waits),
        "still_at_work": at_work,
        "memory_growth_mb": round(growth, 1),
        "memory_mb": memory_mb,
        "problems": tally.problems,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--scripts", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-growth-mb", type=float, default=8, help="of the medians of the first and last third")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    harness.check_json(arguments.json)
    result = soak(arguments.bundle, arguments.minutes, arguments.clients, arguments.scripts, arguments.threads)
    harness.write_json(arguments.json, result)
    show("\n")
    names = [name for name in result if name not in ("environment", "memory_mb", "problems")]
    print(harness.table(["figure", "value"], [[name, str(result[name])] for name in names]))
    for text in result["problems"]:
        print(f"problem: {text}")
    bad = [name for name in ("errors", "mismatches", "still_at_work") if result[name]]
    bad += ["memory_growth_mb"] if result["memory_growth_mb"] > arguments.max_growth_mb else []
    print(f"FAILED: {', '.join(bad)}" if bad else "ok")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
