"""Speed and memory of a bundle on this machine: what `sinkexport bench` measures.

Stream positions are measured in turns. The stream is really fed up to each position and copied there; a turn puts the
copy back, takes some untimed steps (the copy has pushed the weights out of the caches) and then times a few. So slow
moments of a shared machine hit all positions alike, and ratios are taken turn by turn. The memory's own speed has its
turn in every round too: a share of the bandwidth is only one of what the machine gave at that time.

A step is one run of the decode graph and the argmax of its logits, which picks the next token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sinkrt import Session
from sinkrt.contract import Manifest, load_manifest
from sinkrt.errors import UsageError, problem
from sinkrt.session import StreamCopy

from sinkexport.bench.machine import PROBE_BYTES, MemoryMeter, ReadProbe, environment, physical_cores
from sinkexport.bench.step_bytes import weight_bytes_per_step
from sinkexport.bench.timing import Ratio, Stats
from sinkexport.util.progress import Report, silent

TURN = 16
"""Timed steps of one position before the next one has its turn."""
PREFILLS = 3
FEED_TOKENS = 256
"""About as many tokens are fed between two looks at the progress."""


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What to measure.

    steps: timed steps at each position. warmup: untimed steps before each turn of `TURN` timed ones.
    positions: tokens in the stream when a turn starts; the first in order is what the others are compared with.
    prompt_tokens: length of the prompt of the prefill. threads: None for all physical cores. seed: of the random ids.

    Raises: UsageError.
    """

    steps: int = 256
    warmup: int = 3
    positions: tuple[int, ...] = (2_000, 50_000)
    prompt_tokens: int = 1_000
    threads: int | None = None
    backend: str = "ort"
    seed: int = 0
    probe_bytes: int = PROBE_BYTES

    def __post_init__(self) -> None:
        _at_least("--steps", self.steps, 1)
        _at_least("--warmup", self.warmup, 0)
        _at_least("--prompt-tokens", self.prompt_tokens, 1)
        _at_least("--threads", 1 if self.threads is None else self.threads, 1)
        if not self.positions:
            raise UsageError(problem("--position", received="none", expected="at least one", fix="give one"))
        for position in self.positions:
            _at_least("--position", position, 1)

    def check_room(self, limit: int) -> None:
        """Raises: UsageError if a stream of at most `limit` tokens is too short for this."""
        turn = self.warmup + min(TURN, self.steps)
        for option, tokens, fix in (
            ("--position", max(self.positions) + turn, f"give at most {limit - turn}"),
            ("--prompt-tokens", self.prompt_tokens, f"give at most {limit}"),
        ):
            if tokens > limit:
                raise UsageError(
                    problem(
                        option,
                        received=f"a stream of {tokens} tokens",
                        expected=f"at most {limit} in a stream of this bundle",
                        fix=fix,
                    )
                )


@dataclasses.dataclass(frozen=True)
class PositionTimes:
    """Timed steps of one position. turns_ms: times in the order of measuring, one tuple a turn."""

    position: int
    turns_ms: tuple[tuple[float, ...], ...]

    @property
    def times_ms(self) -> list[float]:
        """All of them."""
        return [ms for turn in self.turns_ms for ms in turn]


@dataclasses.dataclass(frozen=True)
class BenchReport:
    """What was measured. GB are 1e9 bytes.

    weight_bytes, state_bytes: read by one step. bandwidth_gb_per_s: one figure a round. prefill_ms: one a prefill.
    rss_bytes: (at the start, at the end, highest) without what the benchmark holds; None where the system does not
    tell.
    """

    config: BenchConfig
    manifest: Manifest
    environment: dict[str, Any]
    weight_bytes: int
    positions: tuple[PositionTimes, ...]
    bandwidth_gb_per_s: tuple[float, ...]
    prefill_ms: tuple[float, ...]
    rss_bytes: tuple[int, int, int] | None

    @property
    def step_bytes(self) -> int:
        """Bytes that one step has to read: weights and all states."""
        return self.weight_bytes + self.manifest.state_bytes

    @property
    def floor_ms(self) -> float:
        """The time of a step that does nothing but read its bytes."""
        return self.step_bytes / statistics.median(self.bandwidth_gb_per_s) / 1e6

    def speed(self, times_ms: list[float]) -> dict[str, float]:
        """Figures of decode steps. tokens_per_s: of all streams together."""
        stats = Stats.of(times_ms)
        return {
            **dataclasses.asdict(stats),
            "tokens_per_s": self.manifest.stream.batch * 1e3 / stats.median_ms,
            "gb_per_s": self.step_bytes / stats.median_ms / 1e6,
            "bandwidth_share": self.floor_ms / stats.median_ms,
        }

    def prefill(self) -> dict[str, float]:
        """Figures of the prompt. tokens_per_s: of all streams together."""
        median_ms = statistics.median(self.prefill_ms)
        return {
            "prompt_tokens": self.config.prompt_tokens,
            "repeats": len(self.prefill_ms),
            "median_ms": median_ms,
            "tokens_per_s": self.manifest.stream.batch * self.config.prompt_tokens * 1e3 / median_ms,
        }

    def to_dict(self) -> dict[str, Any]:
        """All figures by name, with units in the names, ready for JSON."""
        stream, model = self.manifest.stream, self.manifest.model
        bandwidth = self.bandwidth_gb_per_s
        settings = dataclasses.asdict(self.config)
        del settings["threads"]  # the environment has the number that was really used
        base = self.positions[0].turns_ms
        return {
            "environment": self.environment,
            "settings": settings,
            "bundle": {
                "model": model.name,
                "weights_dtype": self.manifest.weights_dtype,
                "num_sink_tokens": stream.num_sink_tokens,
                "window_size": stream.window_size,
                "batch": stream.batch,
                "chunk_size": stream.chunk_size,
                "producer": dict(self.manifest.producer),
            },
            "bytes_per_step": {"weights": self.weight_bytes, "states": self.manifest.state_bytes},
            "bandwidth_gb_per_s": {
                "median": statistics.median(bandwidth),
                "min": min(bandwidth),
                "max": max(bandwidth),
            },
            "floor_ms": self.floor_ms,
            "decode": self.speed([ms for each in self.positions for ms in each.times_ms]),
            "positions": [
                {
                    "position": each.position,
                    **self.speed(each.times_ms),
                    "ratio_to_first": dataclasses.asdict(Ratio.of_turns(each.turns_ms, base)),
                }
                for each in self.positions
            ],
            "prefill": self.prefill(),
            "memory": None
            if self.rss_bytes is None
            else {
                "rss_start_bytes": self.rss_bytes[0],
                "rss_end_bytes": self.rss_bytes[1],
                "rss_growth_bytes": self.rss_bytes[1] - self.rss_bytes[0],
                "rss_highest_growth_bytes": self.rss_bytes[2] - self.rss_bytes[0],
            },
        }

    def to_json(self) -> str:
        """Readable and stable, so that two runs can be compared with diff."""
        return json.dumps(self.to_dict(), indent=1, sort_keys=True) + "\n"


def run_bench(bundle: Path, config: BenchConfig, report: Report = silent) -> BenchReport:
    """Measure the bundle folder `bundle`.

    report: told of the stages load, prefill, feed and decode.

    Raises: UsageError, before any work, if a stream of the bundle cannot be that long; BundleError, BackendError.
    """
    manifest = load_manifest(bundle)
    config.check_room(manifest.stream.position_limit)
    weight_bytes = weight_bytes_per_step(bundle, manifest)
    threads = config.threads or physical_cores()
    found = environment(threads)  # now: later the load average would be our own doing
    report("load", 0, 1)
    with (
        Session.load(bundle, config.backend, threads=threads) as session,
        contextlib.closing(ReadProbe(threads, config.probe_bytes)) as probe,
    ):
        run = _Run(session, probe, config, report)
        report("load", 1, 1)
        found["not_recorded"] = session.not_recorded
        prefill_ms = run.prefills()
        run.feed()
        positions, bandwidth = run.decode()
        memory = run.memory
    return BenchReport(
        config=config,
        manifest=manifest,
        environment=found,
        weight_bytes=weight_bytes,
        positions=positions,
        bandwidth_gb_per_s=bandwidth,
        prefill_ms=prefill_ms,
        rss_bytes=(memory.start_bytes, memory.latest_bytes, memory.highest_bytes) if memory.known else None,
    )


class _Run:
    """One measurement over one session: first `prefills`, then `feed`, then `decode`."""

    def __init__(self, session: Session, probe: ReadProbe, config: BenchConfig, report: Report) -> None:
        self._session, self._probe, self._config, self._report = session, probe, config, report
        self._random = np.random.default_rng(config.seed)
        self._positions = sorted(set(config.positions))
        self._copies: dict[int, list[StreamCopy]] = {}  # by position: every stream
        self._warm_up()
        self.memory = MemoryMeter(self._held_bytes)

    def prefills(self) -> tuple[float, ...]:
        """Milliseconds of each prompt on empty streams."""
        times_ms = []
        ids = self._ids(self._config.prompt_tokens)
        for number in range(PREFILLS):
            self._report("prefill", number, PREFILLS)
            self._session.reset()
            start = time.perf_counter()
            self._session.prefill(ids)
            times_ms.append((time.perf_counter() - start) * 1e3)
            self.memory.sample(self._held_bytes)
        self._report("prefill", PREFILLS, PREFILLS)
        return tuple(times_ms)

    def feed(self) -> None:
        """Feed the streams to every position and keep a copy there."""
        session, last = self._session, self._positions[-1]
        chunk = session.chunk_size
        piece = max(1, FEED_TOKENS // chunk) * chunk  # whole chunks: only the last piece ends in single steps
        session.reset()
        for position in self._positions:
            while (rest := position - int(session.position[0])) > 0:
                self._report("feed", position - rest, last)
                session.prefill(self._ids(min(rest, piece)))
            self._copies[position] = [session.copy_stream(stream) for stream in range(session.batch)]
            self.memory.sample(self._held_bytes)
        self._report("feed", last, last)

    def decode(self) -> tuple[tuple[PositionTimes, ...], tuple[float, ...]]:
        """Times by position, and GB/s of the memory by round."""
        turns: dict[int, list[tuple[float, ...]]] = {position: [] for position in self._positions}
        bandwidth = []
        order, left = list(self._positions), self._config.steps
        while left:
            self._report("decode", self._config.steps - left, self._config.steps)
            count = min(TURN, left)
            for position in order:
                turns[position].append(self._turn(position, count))
            order.reverse()  # who comes first in a round comes last in the next
            bandwidth.append(self._probe.gb_per_s(repeats=3))
            self.memory.sample(self._held_bytes)
            left -= count
        self._report("decode", self._config.steps, self._config.steps)
        return tuple(PositionTimes(p, tuple(turns[p])) for p in self._positions), tuple(bandwidth)

    def _turn(self, position: int, count: int) -> tuple[float, ...]:
        """Milliseconds of `count` steps from `position` on."""
        session = self._session
        for stream, copy in enumerate(self._copies[position]):
            session.place_stream(stream, copy)
        ids = session.logits.argmax(axis=1)  # [B]
        for _ in range(self._config.warmup):
            ids = session.step(ids).argmax(axis=1)
        times_ms = []
        for _ in range(count):
            start = time.perf_counter()
            ids = session.step(ids).argmax(axis=1)
            times_ms.append((time.perf_counter() - start) * 1e3)
        return tuple(times_ms)

    def _warm_up(self) -> None:
        """One chunk and one step, so that all memory that a stream needs is there before it is first measured."""
        self._session.prefill(self._ids(min(self._session.chunk_size, self._config.prompt_tokens)))
        if self._session.manifest.stream.position_limit > int(self._session.position[0]):
            self._session.step(self._session.logits.argmax(axis=1))
        self._probe.gb_per_s(repeats=1)

    def _ids(self, count: int) -> npt.NDArray[np.int64]:
        """int64 [B, count], random."""
        return self._random.integers(0, self._session.manifest.model.vocab_size, (self._session.batch, count))

    @property
    def _held_bytes(self) -> int:
        return self._probe.nbytes + sum(copy.nbytes for copies in self._copies.values() for copy in copies)


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(problem(option, received=value, expected=f">= {least}", fix="give a larger number"))
