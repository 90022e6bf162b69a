"""What a benchmark measures, and its figures."""

from __future__ import annotations

import dataclasses
import json
import statistics
from typing import Any

from sinkrt.backends import BACKENDS
from sinkrt.contract import Manifest
from sinkrt.errors import UsageError, problem

from sinkexport.bench.machine import PROBE_BYTES
from sinkexport.bench.timing import Ratio, Stats

TURN = 16
"""Timed steps of one position before the next one has its turn."""


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What to measure.

    steps: timed steps at each position. warmup: untimed steps before each turn of `TURN` timed ones.
    positions: tokens in the stream when a turn starts; the others are compared with the smallest.
    prompt_tokens: length of the prompt whose prefill is timed. threads: None for all physical cores.
    seed: of the random ids. probe_bytes: that the probe of the memory's bandwidth reads.

    Raises: UsageError.
    """

    steps: int = 256
    warmup: int = 3
    positions: tuple[int, ...] = (2_000, 50_000)
    prompt_tokens: int = 1_000
    threads: int | None = None
    backend: str = BACKENDS[0]
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
        """Check that a stream of at most `limit` tokens is long enough.

        Raises: UsageError.
        """
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
        """All times, in the order of measuring."""
        return [ms for turn in self.turns_ms for ms in turn]


@dataclasses.dataclass(frozen=True)
class BenchReport:
    """Result of `run_bench`. GB are 1e9 bytes.

    weight_bytes: weights that one step reads. bandwidth_gb_per_s: one figure a round. prefill_ms: one a prefill.
    rss_bytes: (at the start, at the end, highest) without what the benchmark holds; None where the system does not
    report it.
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
        """Bytes that one step reads: weights and all states."""
        return self.weight_bytes + self.manifest.state_bytes

    @property
    def floor_ms(self) -> float:
        """Time of a step that only reads its bytes, milliseconds."""
        return self.step_bytes / statistics.median(self.bandwidth_gb_per_s) / 1e6

    def speed(self, times_ms: list[float]) -> dict[str, float]:
        """Compute figures of decode steps. tokens_per_s: of all streams together."""
        stats = Stats.of(times_ms)
        return {
            **dataclasses.asdict(stats),
            "tokens_per_s": self.manifest.stream.batch * 1e3 / stats.median_ms,
            "gb_per_s": self.step_bytes / stats.median_ms / 1e6,
            "bandwidth_share": self.floor_ms / stats.median_ms,
        }

    def prefill(self) -> dict[str, float]:
        """Compute figures of the prefill. tokens_per_s: of all streams together."""
        median_ms = statistics.median(self.prefill_ms)
        return {
            "prompt_tokens": self.config.prompt_tokens,
            "repeats": len(self.prefill_ms),
            "median_ms": median_ms,
            "tokens_per_s": self.manifest.stream.batch * self.config.prompt_tokens * 1e3 / median_ms,
        }

    def to_dict(self) -> dict[str, Any]:
        """List all figures by name, with units in the names, ready for JSON."""
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
                "has_attention": bool(self.manifest.caches),
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
        """Write all figures, readable and stable, so that diff can compare two runs."""
        return json.dumps(self.to_dict(), indent=1, sort_keys=True) + "\n"


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(problem(option, received=value, expected=f">= {least}", fix="give a larger number"))
