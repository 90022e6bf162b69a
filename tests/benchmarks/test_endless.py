"""`endless.py` on the toy bundle, and the plot of what it records. No test depends on how long anything takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.toy import Toy, build_toy

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
RECORD = SCRIPTS / "results" / "endless.json"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files import each other as scripts do."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("endless")
    path = folder / "endless.json"
    _run(build_toy(folder / "toy", Toy()), path)
    return path


def _run(bundle: Path, path: Path) -> str:
    limits = ["--tokens=50", "--seconds=60", "--bucket=16", "--threads=1"]
    command = [sys.executable, SCRIPTS / "endless.py", bundle, "--model=unused.gguf", "--json", path, *limits]
    done = subprocess.run([*command, "--decoders=sinkexport"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_buckets_hold_all_tokens(record: Path) -> None:
    """50 tokens in buckets of 16: three whole ones and a rest; memory is of the loaded process."""
    found = json.loads(record.read_text())["decoders"]["sinkexport"]
    buckets = found["buckets"]
    assert buckets["end"] == [16, 32, 48, 50]
    assert {len(values) for values in buckets.values()} == {4}
    for median, p99, largest in zip(buckets["median_ms"], buckets["p99_ms"], buckets["max_ms"], strict=True):
        assert 0 < median <= p99 <= largest
    assert min(buckets["resident_mb"]) > 10
    assert found["ended"] == "tokens" and found["whole"]["max_ms"] == max(buckets["max_ms"])
    assert found["environment"]["threads"] == 1 and found["packages"]["numpy"] == np.__version__


def test_what_is_recorded_is_skipped(record: Path) -> None:
    """A second run measures nothing, and leaves the file as it is."""
    before = record.read_bytes()
    assert "sinkexport: in the file, skipped" in _run(record.parent / "toy", record)
    assert record.read_bytes() == before


@pytest.mark.parametrize("which", ["toy", "recorded"])
def test_the_plot_is_drawn(which: str, record: Path, benchmarks: None, tmp_path: Path) -> None:
    """From a run of now, and from the one that docs/img/endless.svg shows; the same twice."""
    import plot_endless

    result = json.loads((record if which == "toy" else RECORD).read_text())
    figure = plot_endless.draw(result)
    times, memory = figure.axes
    for axes in (times, memory):
        labels = {line.get_label() for line in axes.get_lines()}
        assert {plot_endless.STYLES[name][0] for name in result["decoders"]} <= labels
    for name in ("a.svg", "b.svg"):
        command = [sys.executable, SCRIPTS / "plot_endless.py", record if which == "toy" else RECORD]
        subprocess.run([*command, "-o", tmp_path / name], check=True)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_merged_buckets_keep_the_spikes(benchmarks: None) -> None:
    """However many buckets are drawn as one, the largest time and the last token stay."""
    import plot_endless

    count = 2000
    buckets = {key: np.ones(count) for key in ("median_ms", "p99_ms", "max_ms", "resident_mb")}
    buckets["end"] = np.arange(1.0, count + 1) * 256
    buckets["max_ms"][1234] = 99
    found = plot_endless.merged(buckets)
    assert len(found["end"]) <= plot_endless.MAX_POINTS
    assert found["end"][-1] == count * 256 and found["max_ms"].max() == 99
    assert (np.diff(found["end"]) > 0).all()


def test_a_float32_copy_of_a_gguf_file(benchmarks: None, tmp_path: Path) -> None:
    """The same metadata, tensors in the same order, and each value as gguf-py dequantises it; made once."""
    import gguf
    from peers import float32_gguf

    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    rounded = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_uint32("llama.block_count", 3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é"])
    writer.add_tensor("a", rounded, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("b", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    copy = float32_gguf(tmp_path / "tiny.gguf", tmp_path)
    reader = gguf.GGUFReader(copy)
    assert [(tensor.name, tensor.tensor_type.name) for tensor in reader.tensors] == [("a", "F32"), ("b", "F32")]
    wanted = gguf.quants.dequantize(rounded, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(reader.tensors[0].data.reshape(4, 64), wanted)
    np.testing.assert_array_equal(reader.tensors[1].data, values[0])
    assert reader.fields["llama.block_count"].contents() == 3
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "é"]
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.ALL_F32
    changed = copy.stat().st_mtime_ns
    assert float32_gguf(tmp_path / "tiny.gguf", tmp_path).stat().st_mtime_ns == changed
