"""benchmarks/: workers in processes of their own, what llama.cpp forgets, and the tables. Nothing is timed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sinkexport.bench.report import BenchConfig, BenchReport
from sinkexport.bench.run import run_bench
from sinkrt import Session

from tests.fidelity.gguf_writer import tiny, write
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


def test_llama_cpp_from_its_wheel(tmp_path: Path) -> None:
    """Its server reports a time for each step, and no tokens; a second turn starts at the end of the prompt again."""
    from workers import running

    model = write(tmp_path / "tiny.gguf", tiny("llama"))
    with running({"xllamacpp": model}, "", threads=1, capacity=64, sinks=2) as workers:
        for prompt in ([5, 17, 42, 8], [6, 17, 42, 8, 90]):
            start, first, second = workers[0].prefill(prompt, 64), workers[0].steps(5), workers[0].steps(3)
            assert [len(reply.ms) for reply in (start, first, second)] == [1, 5, 3]
            assert min(first.ms + second.ms) > 0 and not start.tokens + first.tokens + second.tokens


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


def test_figures_of_quantised_decode(report: BenchReport) -> None:
    """Floors count weights and cache; a peer's cache has as many elements as the first bundle's."""
    import decode_quantised
    from decode_cpu import Course

    state_bytes = report.manifest.state_bytes
    caches = decode_quantised.caches({"ours": report.manifest}, ["genai:int4", "xllamacpp", "openvino"])
    assert caches == {
        "ours": ("float32", state_bytes),
        "genai:int4": ("float32", state_bytes),
        "xllamacpp": ("float16", state_bytes // 2),
        "openvino": ("uint8", state_bytes // 4),
    }
    courses = {"ours": Course([10.0, 10.0], [1, 2], 50), "xllamacpp": Course([20.0], [], 60)}
    weights = {"ours": 10_000_000 - state_bytes, "xllamacpp": 5_000_000 - state_bytes // 2}
    result = decode_quantised.report(courses, [1.0, 2.0, 4.0], weights, caches)
    ours, peer = result["decoders"].values()
    assert (ours["ratio_to_floor"], ours["speed_up"], ours["gb_per_s"]) == (2, 1, 1)
    assert (peer["ratio_to_floor"], peer["speed_up"], peer["gb_per_s"]) == (8, 0.5, 0.25)


def test_figures_of_prefill() -> None:
    import prefill_cpu

    courses = {
        "ours": prefill_cpu.Course([10.0, 20.0], [1, 2], 50),
        "genai": prefill_cpu.Course([20.0, 40.0], [1, 3], 60),
        "xllamacpp": prefill_cpu.Course([5.0, 10.0], [], 70),
    }
    result = prefill_cpu.report(courses, 30)
    assert [each["times_ours"]["median"] for each in result.values()] == [1, 2, 0.5]
    assert [each["same_tokens"] for each in result.values()] == [2, 1, None]
    assert result["ours"]["tokens_per_s"] == 2000


def test_figures_of_a_step() -> None:
    import step_breakdown

    times = {("a", "MatMul"): 2.0, ("b", "MatMul"): 1.0, ("c", "Add"): 0.5}
    result = step_breakdown.report(times, {"a": "MatMul 4 x 8"}, layers=1, step_ms=4.0)
    assert list(result["kinds"]) == ["MatMul 4 x 8", "MatMul", "Add"]
    assert (result["nodes"], result["nodes_ms"], result["overhead_ms"]) == (3, 3.5, 0.5)
