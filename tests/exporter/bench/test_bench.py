"""`sinkexport bench` on the toy bundle, and what it is made of. No test depends on how long anything takes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import stat
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from sinkexport.bench import run as bench
from sinkexport.bench.machine import READERS, ReadProbe, environment, physical_cores
from sinkexport.bench.report import TURN, BenchConfig, BenchReport, PositionTimes
from sinkexport.bench.run import run_bench
from sinkexport.bench.step_bytes import weight_bytes_of_file, weight_bytes_per_step
from sinkexport.bench.timing import Ratio, Stats
from sinkexport.config import ExportConfig
from sinkexport.pipeline.export import export_loaded
from sinkexport.sources import LoadedModel
from sinkexport.util.files import check_writable, write_whole
from sinkrt import Session
from sinkrt.contract import load_manifest
from sinkrt.errors import BundleError, UsageError

from tests.exporter.tiny_models import tiny_model
from tests.runtime.toy import Toy, build_toy
from tests.support import run_cli

TOY = Toy(window_size=8, chunk_size=4)  # S=2, C=10
SMALL = BenchConfig(steps=20, warmup=1, positions=(37, 5), prompt_tokens=23, threads=1, probe_bytes=1 << 16)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy(tmp_path_factory.mktemp("bench") / "toy", TOY)


@pytest.fixture(scope="module")
def report(toy: Path) -> BenchReport:
    return run_bench(toy, SMALL)


# --- statistics ------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=300))
def test_stats_against_numpy(times_ms: list[float]) -> None:
    stats = Stats.of(times_ms)
    assert stats.samples == len(times_ms)
    assert stats.median_ms == pytest.approx(np.median(times_ms))
    assert stats.p99_ms == np.percentile(times_ms, 99, method="inverted_cdf")
    assert stats.min_ms == min(times_ms)
    assert stats.p99_ms in times_ms


def test_p99_of_a_hundred_leaves_one_out() -> None:
    assert Stats.of(range(1, 101)).p99_ms == 99
    assert Stats.of(range(1, 100)).p99_ms == 99


def test_a_ratio_of_turns_does_not_see_what_both_sides_share() -> None:
    slow_minutes = [1.0, 7.0, 1.5, 30.0, 1.0]
    base = [[10.0 * slow, 12.0 * slow, 11.0 * slow] for slow in slow_minutes]
    ours = [[1.02 * ms for ms in turn] for turn in base]
    assert Ratio.of_turns(ours, base) == Ratio(*[pytest.approx(1.02)] * 3)
    assert Ratio.of_turns(base, base) == Ratio(1.0, 1.0, 1.0)


def test_quartiles_of_a_ratio() -> None:
    ratio = Ratio.of_turns([[1.0], [2.0], [3.0], [4.0], [5.0]], [[1.0]] * 5)
    assert (ratio.low_quartile, ratio.median, ratio.high_quartile) == (2.0, 3.0, 4.0)
    assert Ratio.of_turns([[3.0, 5.0]], [[2.0]]) == Ratio(2.0, 2.0, 2.0)


# --- bytes of a step -------------------------------------------------------------------------------------------------


def save_graph(path: Path, nodes: list[onnx.NodeProto], initializers: list[onnx.TensorProto], **options: Any) -> Path:
    graph = helper.make_graph(nodes, "g", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    graph.initializer.extend(initializers)
    onnx.save(helper.make_model(graph, producer_name="p" * 200), path, **options)
    return path


def weight(name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ones(shape, dtype), name)


def test_a_gathered_table_does_not_count(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Mul", ["h", "w"], ["y"]),  # read twice, but a step's bytes count once
    ]
    tensors = [weight("table", (50, 8)), weight("w", (8, 3), np.float16), weight("unused", (99,))]
    ids = weight("ids", (2,), np.int64)
    assert weight_bytes_of_file(save_graph(tmp_path / "g.onnx", nodes, [*tensors, ids])) == 8 * 3 * 2 + 2 * 8


def test_of_gathered_experts_the_chosen_ones_count(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["experts", "chosen"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    graph.initializer.append(weight("experts", (32, 8, 5), np.float16))
    graph.value_info.append(helper.make_tensor_value_info("w", TensorProto.FLOAT16, [3, 8, 5]))
    onnx.save(helper.make_model(graph), tmp_path / "g.onnx")
    assert weight_bytes_of_file(tmp_path / "g.onnx") == 3 * 8 * 5 * 2


def test_a_tied_table_counts_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("Transpose", ["table"], ["t"]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    assert weight_bytes_of_file(save_graph(tmp_path / "g.onnx", nodes, [weight("table", (50, 8))])) == 50 * 8 * 4


@pytest.mark.parametrize(
    ("data_type", "num_bytes"),
    [
        (TensorProto.INT4, 150),
        (TensorProto.UINT4, 150),
        (TensorProto.INT8, 300),
        (TensorProto.BFLOAT16, 600),
        (TensorProto.DOUBLE, 2400),
        (TensorProto.FLOAT8E4M3FN, 300),
    ],
)
def test_quantized_weights(tmp_path: Path, data_type: int, num_bytes: int) -> None:
    tensor = TensorProto(name="w", data_type=data_type, dims=[300, 1], raw_data=b"")
    nodes = [helper.make_node("Identity", ["w"], ["y"])]
    assert weight_bytes_of_file(save_graph(tmp_path / "g.onnx", nodes, [tensor])) == num_bytes


def test_external_weights_count_too(toy: Path) -> None:
    """Against onnx' own reader; in a toy all matrices but the gathered embedding are multiplied with."""
    graph = onnx.load(toy / "decode.onnx", load_external_data=False).graph
    everything = {
        t.name: int(np.prod(t.dims)) * helper.tensor_dtype_to_np_dtype(t.data_type).itemsize for t in graph.initializer
    }
    assert weight_bytes_of_file(toy / "decode.onnx") == sum(everything.values()) - everything["embedding"]
    assert load_manifest(toy).graphs["decode"].weight_bytes == weight_bytes_of_file(toy / "decode.onnx")
    assert any(t.data_location == TensorProto.EXTERNAL for t in graph.initializer)


def test_an_export_records_what_its_graphs_read(tmp_path: Path) -> None:
    """An older bundle gives the same number by its graph; without onnx it says what to do."""
    loaded = LoadedModel(tiny_model("mixtral"), None, "tiny")
    manifest = export_loaded(loaded, tmp_path / "b", ExportConfig(2, 8, chunk_size=4))
    for graph in manifest.graphs.values():
        assert graph.weight_bytes == weight_bytes_of_file(tmp_path / "b" / graph.file) > 0
    recorded = weight_bytes_per_step(tmp_path / "b", manifest)
    assert recorded == manifest.graphs["decode"].weight_bytes
    graphs = {role: dataclasses.replace(graph, weight_bytes=None) for role, graph in manifest.graphs.items()}
    older = dataclasses.replace(manifest, schema_version=5, graphs=graphs)
    assert weight_bytes_per_step(tmp_path / "b", older) == recorded
    assert older.fingerprint == manifest.fingerprint


def test_without_onnx_an_older_bundle_says_what_to_do(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = load_manifest(toy)
    graphs = {role: dataclasses.replace(graph, weight_bytes=None) for role, graph in manifest.graphs.items()}
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BundleError, match=r"for 'decode\.onnx', expected one of schema 6 or newer"):
        weight_bytes_per_step(toy, dataclasses.replace(manifest, graphs=graphs))


@pytest.mark.parametrize("content", [b"", b"not a graph at all", b"\x3a\xff\x01abc", b"\x3a", b"\x3b\x00"])
def test_what_is_no_graph(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "decode.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"decode\.onnx: received a file that is no ONNX graph"):
        weight_bytes_of_file(tmp_path / "decode.onnx")


# --- the machine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_probe_reads_every_byte_once(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setitem(READERS, "max float32", lambda part: seen.append((part.ctypes.data, part.nbytes)))
    probe = ReadProbe(threads, 1 << 14)
    assert probe.gb_per_s(repeats=1) > 0
    probe.close()
    one_read = sorted(seen[:threads])
    assert sum(size for _, size in one_read) == probe.nbytes == 1 << 14
    assert all(a + size == b for (a, size), (b, _) in itertools.pairwise(one_read))
    assert len(seen) == 2 * threads  # a warm-up and one repeat


def test_cores_and_environment() -> None:
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)
    facts = environment(3)
    assert facts["threads"] == 3
    assert facts["packages"]["numpy"] == np.__version__
    json.dumps(facts)


METER = """
import numpy as np
from sinkexport.bench.machine import MemoryMeter
meter = MemoryMeter()
block = np.ones(64 << 20, np.uint8)
meter.sample()
assert 60 << 20 < meter.latest_bytes - meter.start_bytes < 70 << 20
meter.sample(held_bytes=block.nbytes)
assert abs(meter.latest_bytes - meter.start_bytes) < 4 << 20
assert meter.highest_bytes - meter.start_bytes > 60 << 20
"""


def test_the_meter_sees_memory_and_leaves_out_what_is_held() -> None:
    # A process of its own: this one may hold free memory of earlier tests, which a block would not add to.
    subprocess.run([sys.executable, "-c", METER], check=True)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")
    check_writable(path, "--json")
    assert path.read_text() == "old"
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UsageError, match="No space left"):
        write_whole(path, "new", "--json")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_whole(path, "new", "--json")
    assert path.read_text() == "new"
    assert [f.name for f in tmp_path.iterdir()] == ["out.json"]


def test_a_device_is_written_to_not_replaced(tmp_path: Path) -> None:
    check_writable(Path("/dev/null"), "--json")
    write_whole(Path("/dev/null"), "text", "--json")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


# --- a measurement ---------------------------------------------------------------------------------------------------


def test_every_position_is_really_reached(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream stands where a turn says, with the very states that feeding its tokens gives."""
    fed: list[int] = []
    turns: list[tuple[int, np.ndarray]] = []
    prefill, step = Session.prefill, Session.step

    def noting_prefill(self: Session, ids: Any, *rest: Any) -> Any:
        if self.position[0] == 0:
            fed.clear()
        fed.extend(np.asarray(ids)[0].tolist())
        return prefill(self, ids, *rest)

    def noting_step(self: Session, ids: Any, *rest: Any) -> Any:
        turns.append((int(self.position[0]), self.buffers["window_k.0"].copy()))
        return step(self, ids, *rest)

    monkeypatch.setattr(Session, "prefill", noting_prefill)
    monkeypatch.setattr(Session, "step", noting_step)
    run_bench(toy, SMALL)
    turns = turns[1:]  # the first step warms up
    monkeypatch.undo()

    # 20 steps: a turn of 16 and one of 4, each after one warm-up step, in the order 5 37 37 5.
    expected = [(5, TURN), (37, TURN), (37, 4), (5, 4)]
    assert [p for p, *_ in turns] == [p + i for p, count in expected for i in range(1 + count)]
    with Session.load(toy, threads=1) as session:
        for position in (5, 37):
            session.reset()
            for token in fed[:position]:
                session.step([token])
            starts = [state for at, state in turns if at == position]
            assert len(starts) == 2
            for state in starts:
                np.testing.assert_allclose(state, session.buffers["window_k.0"], atol=1e-6)


def test_figures_fit_together(report: BenchReport) -> None:
    result = json.loads(report.to_json())
    assert result["settings"]["positions"] == [37, 5]
    assert [each["position"] for each in result["positions"]] == [5, 37]
    size, decode = result["bytes_per_step"], result["decode"]
    assert size == {"weights": report.weight_bytes, "states": report.manifest.state_bytes}
    assert decode["samples"] == 40
    for each in [decode, *result["positions"]]:
        assert each["min_ms"] <= each["median_ms"] <= each["p99_ms"]
        assert each["tokens_per_s"] == pytest.approx(1e3 / each["median_ms"])
        assert each["gb_per_s"] == pytest.approx((size["weights"] + size["states"]) / each["median_ms"] / 1e6)
        assert each["bandwidth_share"] == pytest.approx(each["gb_per_s"] / result["bandwidth_gb_per_s"]["median"])
        assert each["bandwidth_share"] == pytest.approx(result["floor_ms"] / each["median_ms"])
    assert [each["samples"] for each in result["positions"]] == [20, 20]
    assert result["positions"][0]["ratio_to_first"] == {"median": 1, "low_quartile": 1, "high_quartile": 1}
    first, last = report.positions
    assert result["positions"][1]["ratio_to_first"]["median"] == pytest.approx(
        statistics.mean(
            statistics.median(a) / statistics.median(b) for a, b in zip(last.turns_ms, first.turns_ms, strict=True)
        )
    )  # the median of two turns is their mean
    prefill = result["prefill"]
    assert prefill["tokens_per_s"] == pytest.approx(23e3 / prefill["median_ms"])
    memory = result["memory"]
    assert memory["rss_growth_bytes"] == memory["rss_end_bytes"] - memory["rss_start_bytes"]
    assert memory["rss_highest_growth_bytes"] >= max(0, memory["rss_growth_bytes"])
    assert len(report.bandwidth_gb_per_s) == 2  # a figure a round
    assert result["environment"]["threads"] == 1
    assert result["bundle"]["chunk_size"] == 4


def test_known_times_give_known_figures(report: BenchReport) -> None:
    known = BenchReport(
        config=BenchConfig(steps=2, positions=(1, 2), prompt_tokens=100, threads=1),
        manifest=report.manifest,
        environment={"threads": 1},
        weight_bytes=10_000_000 - report.manifest.state_bytes,
        positions=(PositionTimes(1, ((10.0, 10.0),)), PositionTimes(2, ((11.0, 11.0),))),
        bandwidth_gb_per_s=(1.0, 2.0, 4.0),
        prefill_ms=(400.0, 500.0, 900.0),
        rss_bytes=None,
    ).to_dict()
    assert known["floor_ms"] == 5.0  # 10 MB at 2 GB/s
    assert known["positions"][0]["gb_per_s"] == 1.0
    assert known["positions"][0]["bandwidth_share"] == 0.5
    assert known["positions"][1]["ratio_to_first"]["median"] == pytest.approx(1.1)
    assert known["prefill"]["tokens_per_s"] == 200.0
    assert known["memory"] is None


def test_several_streams(tmp_path: Path) -> None:
    result = run_bench(build_toy(tmp_path / "toy", Toy(batch=3)), SMALL).to_dict()
    assert result["decode"]["tokens_per_s"] == pytest.approx(3e3 / result["decode"]["median_ms"])
    assert result["prefill"]["tokens_per_s"] == pytest.approx(3 * 23e3 / result["prefill"]["median_ms"])


def test_memory_stays(toy: Path) -> None:
    """Hundreds of turns, 8,000 steps: a step that kept 600 bytes would be seen."""
    result = run_bench(toy, BenchConfig(4_000, 0, (5, 4_000), 23, 1, probe_bytes=1 << 16)).to_dict()
    assert abs(result["memory"]["rss_growth_bytes"]) < 4 << 20


def test_progress(toy: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    run_bench(toy, BenchConfig(5, 0, (600,), 3, 1, probe_bytes=1 << 16), lambda *step: reports.append(step))
    assert list(dict.fromkeys(stage for stage, *_ in reports)) == ["load", "prefill", "feed", "decode"]
    assert [done for stage, done, _ in reports if stage == "feed"] == [0, 256, 512, 600]
    assert all(done <= total for _, done, total in reports)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command(toy: Path, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    options = ("--steps", 4, "--position", 5, "--position", 1200, "--prompt-tokens", 9, "--threads", 1)
    result = run_cli("bench", toy, *options, "--json", path).succeeded()
    assert not result.err
    for text in ("toy: float32, S=2 W=8 B=1 T=4", "1,200", "of bandwidth", "prefill of 9 tokens", "MiB over the run"):
        assert text in result.out
    facts = json.loads(path.read_text())
    assert set(facts) == {
        "environment",
        "settings",
        "bundle",
        "bytes_per_step",
        "bandwidth_gb_per_s",
        "floor_ms",
        "decode",
        "positions",
        "prefill",
        "memory",
    }
    assert [each["position"] for each in facts["positions"]] == [5, 1200]


LIMITED = Toy(position_limit=100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", 0), "--steps: received 0, expected >= 1"),
        (("--steps", "x"), "'x' is not a valid integer"),
        (("--warmup", -1), "--warmup: received -1, expected >= 0"),
        (("--prompt-tokens", 0), "--prompt-tokens: received 0, expected >= 1"),
        (("--threads", 0), "--threads: received 0, expected >= 1"),
        (("--position", 0), "--position: received 0, expected >= 1"),
        (
            ("--position", 82),
            "--position: received a stream of 101 tokens, expected at most 100 in a stream of this "
            "bundle; give at most 81",
        ),
        (("--position", 81, "--prompt-tokens", 101), "--prompt-tokens: received a stream of 101 tokens"),
        (("--json", "FOLDER"), "--json: received"),
        (("--json", "FOLDER/none/bench.json"), "expected a file that can be written; choose another path"),
        (("--backend", "tensorrt", "--position", 5, "--prompt-tokens", 5), "tensorrt"),
    ],
)
def test_bad_input(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    message: str,
) -> None:
    toy = build_toy(tmp_path / "toy", LIMITED)
    monkeypatch.setattr(Session, "prefill", lambda *_: pytest.fail("work began"))
    result = run_cli("bench", toy, *(str(a).replace("FOLDER", str(tmp_path)) for a in arguments))
    result.refusal(message)
    assert not result.out


def test_the_last_position_that_fits(tmp_path: Path) -> None:
    toy = build_toy(tmp_path / "toy", LIMITED)
    config = BenchConfig(TURN, 3, (81,), 100, 1, probe_bytes=1 << 16)
    assert run_bench(toy, config).positions[0].position == 81


def test_no_bundle(tmp_path: Path) -> None:
    run_cli("bench", tmp_path / "none").refusal("manifest.json")


def test_no_heavy_package(toy: Path) -> None:
    code = (
        "import sys; sys.argv = ['sinkexport', 'bench', sys.argv[1], '--steps', '1', '--position', '3', "
        "'--prompt-tokens', '3', '--threads', '1']\n"
        "from sinkexport.cli import main\n"
        "try: main()\n"
        "finally: print({'torch', 'onnx', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(toy)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("set()\n")


def test_manifest_of_the_report(toy: Path, report: BenchReport) -> None:
    assert report.manifest == load_manifest(toy)
    assert len(report.prefill_ms) == bench.PREFILLS
