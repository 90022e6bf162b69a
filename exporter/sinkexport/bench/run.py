"""Speed and memory of a bundle on this machine: what `sinkexport bench` measures.

Stream positions are measured in turns. The stream is really fed up to each position and copied there. A turn puts the
copy back, takes some untimed steps (the copy has pushed the weights out of the caches) and then times a few. So slow
moments of a shared machine hit all positions alike, and ratios are taken turn by turn. Every round measures the
memory's bandwidth too: a step's share of it refers to the same minute.

A step is one run of the decode graph and the argmax of its logits, which picks the next token.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sinkrt import Session
from sinkrt.contract import load_manifest
from sinkrt.session import StreamCopy

from sinkexport.bench.machine import MemoryMeter, ReadProbe, environment, physical_cores
from sinkexport.bench.report import TURN, BenchConfig, BenchReport, PositionTimes
from sinkexport.bench.step_bytes import weight_bytes_per_step
from sinkexport.util.progress import Report, silent

PREFILLS = 3
FEED_TOKENS = 256
"""About as many tokens are fed between two looks at the progress."""


def run_bench(bundle: Path, config: BenchConfig, report: Report = silent) -> BenchReport:
    """Measure the bundle folder `bundle`.

    report: called with the stages load, prefill, feed and decode.

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
    """One measurement over one session: call `prefills`, then `feed`, then `decode`."""

    def __init__(self, session: Session, probe: ReadProbe, config: BenchConfig, report: Report) -> None:
        self._session, self._probe, self._config, self._report = session, probe, config, report
        self._random = np.random.default_rng(config.seed)
        self._positions = sorted(set(config.positions))
        self._copies: dict[int, list[StreamCopy]] = {}  # by position: every stream
        self._warm_up()
        self.memory = MemoryMeter(self._held_bytes)

    def prefills(self) -> tuple[float, ...]:
        """Time prompts on empty streams. Returns: milliseconds of each."""
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
        """Time steps. Returns: times by position, and GB/s of the memory by round."""
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
        """Time `count` steps from `position` on. Returns: milliseconds of each."""
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
        """Run one chunk and one step, so that memory is allocated before it is first measured."""
        self._session.prefill(self._ids(min(self._session.chunk_size, self._config.prompt_tokens)))
        if self._session.manifest.stream.position_limit > int(self._session.position[0]):
            self._session.step(self._session.logits.argmax(axis=1))
        self._probe.gb_per_s(repeats=1)

    def _ids(self, count: int) -> npt.NDArray[np.int64]:
        """Draw random ids. Returns: int64 [B, count]."""
        return self._random.integers(0, self._session.manifest.model.vocab_size, (self._session.batch, count))

    @property
    def _held_bytes(self) -> int:
        return self._probe.nbytes + sum(copy.nbytes for copies in self._copies.values() for copy in copies)
