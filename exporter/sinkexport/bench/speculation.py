"""Speed with guessed tokens beside plain steps, on texts: what `sinkexport bench --speculate` measures.

Both continue the same stream greedily, in turns, so that slow moments of a shared machine hit both alike. Greedy
answers must be the same but where two tokens are equally likely up to rounding; where they part is reported.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sinkrt import Session
from sinkrt.session import StreamCopy
from sinkrt.speculate.tally import Tally

from sinkexport.bench.machine import environment, physical_cores
from sinkexport.bench.speculation_texts import FREE, TASKS
from sinkexport.util.progress import Report, silent

TURNS = 3


@dataclasses.dataclass(frozen=True)
class SpeculationTimes:
    """One text. plain_ms, speculated_ms: milliseconds a token, one figure a turn. tally: of one turn.

    parted_at: token of the answer from which on the two differ; None: they do not.
    """

    name: str
    is_task: bool
    plain_ms: tuple[float, ...]
    speculated_ms: tuple[float, ...]
    tally: Tally
    parted_at: int | None

    @property
    def speedup(self) -> float:
        """How many times as fast: the median of the turns' ratios."""
        pairs = zip(self.plain_ms, self.speculated_ms, strict=True)
        return statistics.median(plain / speculated for plain, speculated in pairs)

    def to_dict(self) -> dict[str, Any]:
        """List the figures by name."""
        return {
            **dataclasses.asdict(self),
            "speedup": self.speedup,
            "tokens_per_step": self.tally.tokens_per_step,
            "acceptance": self.tally.acceptance,
        }


@dataclasses.dataclass(frozen=True)
class SpeculationReport:
    """Figures of all texts. speculate: what guessed."""

    speculate: str
    environment: dict[str, Any]
    texts: tuple[SpeculationTimes, ...]

    def mean_speedup(self, *, of_tasks: bool) -> float:
        """Mean over the tasks, or over free texts."""
        return statistics.mean(text.speedup for text in self.texts if text.is_task == of_tasks)

    def to_json(self) -> str:
        """Write all figures."""
        texts = [text.to_dict() for text in self.texts]
        facts = {"speculate": self.speculate, "environment": self.environment, "texts": texts}
        return json.dumps(facts, indent=1, sort_keys=True) + "\n"


def run_speculation(
    bundle: Path,
    speculate: str,
    *,
    tokens: int,
    threads: int | None = None,
    backend: str = "ort",
    turns: int = TURNS,
    report: Report = silent,
) -> SpeculationReport:
    """Measure a bundle with `speculate`. tokens: of each answer.

    Raises: UsageError if the bundle cannot verify guesses, or has no tokenizer; BundleError, BackendError.
    """
    count = threads or physical_cores()
    found = environment(count)
    report("load", 0, 1)
    with Session.load(bundle, backend, threads=count) as session:
        session.speculation(speculate)
        texts = [(name, text, True) for name, text in TASKS.items()] + [
            (name, text, False) for name, text in FREE.items()
        ]
        times = []
        for number, (name, (text, is_chat), is_task) in enumerate(texts):
            report("decode", number, len(texts))
            times.append(
                _measure(session, speculate, name, prompt_ids(session, text, is_chat=is_chat), tokens, turns, is_task)
            )
        report("decode", len(texts), len(texts))
    return SpeculationReport(speculate, found, tuple(times))


def prompt_ids(session: Session, text: str, *, is_chat: bool) -> list[int]:
    """Ids of a text, as a user's message if the bundle has a chat template and `is_chat`."""
    tokenizer = session.tokenizer
    if is_chat and tokenizer.has_chat_template:
        return tokenizer.chat_ids([{"role": "user", "content": text}])
    return tokenizer.prompt_ids(text)


def _measure(
    session: Session, speculate: str, name: str, ids: list[int], tokens: int, turns: int, is_task: bool
) -> SpeculationTimes:
    session.reset()
    session.prefill(ids)
    start = session.copy_stream(0)
    plain_ms, speculated_ms, tally = [], [], Tally()
    answer_ids(session, start, 4, None)  # the copy has pushed the weights out of the caches
    for _ in range(turns):
        plain, ms = answer_ids(session, start, tokens, None)
        plain_ms.append(ms)
        tally = session.speculation(speculate).tally = Tally()
        guessed, ms = answer_ids(session, start, tokens, speculate)
        speculated_ms.append(ms)
    pairs = enumerate(zip(plain, guessed, strict=True))
    parted = next((number for number, (one, other) in pairs if one != other), None)
    return SpeculationTimes(name, is_task, tuple(plain_ms), tuple(speculated_ms), tally, parted)


def answer_ids(
    session: Session,
    start: StreamCopy,
    tokens: int,
    speculate: str | None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[int], float]:
    """Continue a stream. Returns: the last ids that fit the cache, and milliseconds a token. clock: in seconds."""
    session.place_stream(0, start)
    begun = clock()
    for _ in session.generate(None, max_tokens=tokens, ignore_eos=True, speculate=speculate):
        pass
    took = clock() - begun
    return session.recent_ids().tolist()[-min(tokens, session.capacity) :], took * 1e3 / tokens
