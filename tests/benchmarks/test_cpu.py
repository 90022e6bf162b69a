"""benchmarks/: workers in processes of their own, what llama.cpp forgets, and the tables. Nothing is timed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sinkexport.bench.report import BenchConfig, BenchReport
from sinkexport.bench.run import run_bench
from sinkrt import Session

from tests.runtime.toy import Toy, build_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of S = 2, C = 10."""
    return build_toy(tmp_path_factory.mktemp("bench") / "toy", Toy(window_size=8, chunk_size=4))


@pytest.fixture(scope="module")
def report(toy: Path) -> BenchReport:
    return run_bench(
        toy, BenchConfig(steps=1, warmup=1, positions=(5,), prompt_tokens=5, threads=1, probe_bytes=1 << 16)
    )


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files import each other as scripts do."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def test_a_decoder_in_its_process(toy: Path) -> None:
    from workers import DecoderError, packages, running

    with running({"sinkexport": toy, "sinkexport-steps": toy}, "", threads=1, capacity=10, sinks=2) as workers:
        assert packages(workers)["numpy"] == np.__version__
        prompt = list(range(1, 26))
        replies = [(worker.prefill(prompt, 99), worker.steps(5)) for worker in workers]
        with pytest.raises(DecoderError, match="token id: received 9999"):
            workers[0].prefill([9999], 1)
        assert workers[0].prefill(prompt, 99).tokens == replies[0][0].tokens  # it goes on after an error
    with Session.load(toy, threads=1) as session:
        expected = [int(session.prefill(prompt)[0].argmax())]
        for _ in range(5):
            expected.append(int(session.step(expected[-1:])[0].argmax()))
    for first, rest in replies:
        assert first.tokens + rest.tokens == expected
        assert len(first.ms) == 1 and len(rest.ms) == 5 and rest.peak_mb > 1


class FakeLlamaMemory:
    """What llama.cpp keeps of one sequence: tokens by position."""

    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}
        self.most = 0
        self.shifts: list[int] = []

    def llama_memory_seq_pos_max(self, _memory: object, _sequence: int) -> int:
        return max(self.tokens, default=-1)

    def llama_memory_seq_rm(self, _memory: object, _sequence: int, start: int, end: int) -> None:
        self.tokens = {p: token for p, token in self.tokens.items() if not start <= p < end}

    def llama_memory_seq_add(self, _memory: object, _sequence: int, start: int, end: int, delta: int) -> None:
        self.shifts.append(-delta)
        self.tokens = {p + delta if start <= p < end else p: token for p, token in self.tokens.items()}

    def add(self, token: int) -> None:
        self.tokens[max(self.tokens, default=-1) + 1] = token
        self.most = max(self.most, len(self.tokens))


@pytest.mark.parametrize(("shift", "kept"), [(1, [0, 1, *range(32, 40)]), (None, [0, 1, *range(34, 40)])])
def test_llama_cpp_forgets_what_follows_the_sinks(shift: int | None, kept: list[int]) -> None:
    """S = 2, C = 10, 40 tokens: shifted by one, the cache is a bundle's; by halves, 4 of 8 go each time it is full."""
    from baselines import make_room

    memory = FakeLlamaMemory()
    for token in range(40):
        make_room(memory, None, 1, capacity=10, sinks=2, shift=shift)
        memory.add(token)
    assert [memory.tokens[p] for p in range(len(memory.tokens))] == kept  # positions without gaps, in order
    assert memory.most == 10
    assert set(memory.shifts) == {shift or 4}


def test_tables_are_markdown() -> None:
    from harness import table

    assert table(["who", "ms", "why"], [["a", "1.5", "x"], ["long name", "22.5", ""]], texts=(0, 2)).splitlines() == [
        "| who       |   ms | why |",
        "| --------- | ---: | --- |",
        "| a         |  1.5 | x   |",
        "| long name | 22.5 |     |",
    ]


def test_figures_of_decode(report: BenchReport) -> None:
    import decode_cpu

    inside = {
        "sinkexport": decode_cpu.Course([10.0, 10.0], [1, 2, 3], 50),
        "genai": decode_cpu.Course([20.0, 20.0], [1, 2, 4], 60),
        "recompute": decode_cpu.Course([900.0], [1, 2], 70),
    }
    far = {"sinkexport": decode_cpu.Course([10.0], [1], 50)}
    stopped = {"sinkexport": None, "genai": "full | stop", "recompute": None}
    weights = 10_000_000 - report.manifest.state_bytes
    bandwidth = {1: [1.0], 2: [1.0, 2.0, 4.0]}
    result = decode_cpu.report(inside, far, stopped, bandwidth, report.manifest, weights, threads=2)
    ours, genai, recompute = (result["decoders"][name] for name in inside)
    assert result["floor_ms"] == 5
    assert (ours["ratio_to_floor"], genai["times_ours"], recompute["times_ours"]) == (2, 2, 90)
    assert [each["same_tokens"] for each in (ours, genai, recompute)] == [3, 2, 2]
    assert ours["far"]["ratio_to_inside"] == 1 and "far" not in genai
    facts = {
        "cpu": "c",
        "threads": 2,
        "logical_cpus": 2,
        "load_average_1min": 0.0,
        "commit": "x",
        "packages": {},
        "command": "python decode_cpu.py",
    }
    shown = decode_cpu.show({**result, "environment": facts, "context_tokens": [1, 2], "far_tokens": [3, 4]})
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(inside) + 1
    assert len({row.replace(r"\|", "").count("|") for row in rows}) == 1  # what a decoder said must not add a column
