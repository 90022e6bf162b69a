"""TensorRT-RTX: parse and build on the CPU, states written in place, refusals that name every node."""

from __future__ import annotations

import contextlib
import enum
import importlib
import importlib.util
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from sinkexport.config import WEIGHT_DTYPES, ExportConfig
from sinkexport.pipeline.export import export, export_loaded
from sinkexport.sources import LoadedModel
from sinkexport.tensorrt import builder as engine
from sinkexport.tensorrt.builder import build_engine
from sinkexport.tensorrt.options import MODULE, BuildOptions, EngineReport
from sinkexport.tensorrt.process import build_engine_apart
from sinkrt.contract import Manifest
from sinkrt.errors import BackendError, UsageError

from tests.exporter.tiny_models import DAILY, DECODE_GRAPH, TINY, tiny_model
from tests.exporter.variants.test_affine import random_tensors, written
from tests.real_model import smollm2_file
from tests.support import SharedExports, export_model, nightly_but

HAS_TENSORRT = importlib.util.find_spec(MODULE) is not None
# In CI a missing package is a failure, not a skip: SINKEXPORT_NO_SKIP=1 lets the error come out.
needs_tensorrt = [
    pytest.mark.tensorrt,
    pytest.mark.skipif(
        not HAS_TENSORRT and os.environ.get("SINKEXPORT_NO_SKIP") != "1",
        reason="TensorRT-RTX is not installed: pip install 'sinkexport[tensorrt]'",
    ),
]

HKV, D, G = 2, 8, 2
S, W = 4, 12
FLOATS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


def write_model(path: Path, nodes: list, inputs: list, outputs: list, constants: dict | None = None) -> Path:
    """An opset-24 model; arrays above 1 KiB go to an external file beside it, as an exported bundle has them."""
    weights = [numpy_helper.from_array(np.asarray(a), name) for name, a in (constants or {}).items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.save_model(
        model,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location="weights.bin",
        size_threshold=1024,
    )
    onnx.checker.check_model(str(path), full_check=True)
    return path


def ring_model(path: Path, dtype: str, batch: int, hidden: int = 64) -> Path:
    """One ring update and the attention logits over it: the shape of an exported layer.

    x [B, hidden] -> key [B, Hkv, 1, D], written at slot (position - S) mod W; logits = ring . query.
    """
    float_type = FLOATS[dtype]
    nodes = [
        helper.make_node("Sub", ["position", "S"], ["age"]),
        helper.make_node("Mod", ["age", "W"], ["slot"]),
        helper.make_node("MatMul", ["x", "w"], ["flat"]),
        helper.make_node("Reshape", ["flat", "key_shape"], ["key"]),  # [B, Hkv, 1, D]
        helper.make_node("TensorScatter", ["ring", "key", "slot"], ["ring.next"], mode="linear", axis=2),
        helper.make_node("MatMul", ["ring.next", "query"], ["logits"]),  # [B, Hkv, W, G]
    ]
    rng = np.random.default_rng(0)
    constants = {
        "S": np.array([S], np.int64),
        "W": np.array([W], np.int64),
        "w": rng.standard_normal((hidden, HKV * D)).astype(dtype),
        "key_shape": np.array([batch, HKV, 1, D], np.int64),
    }
    inputs = [
        helper.make_tensor_value_info("position", TensorProto.INT64, [batch]),
        helper.make_tensor_value_info("x", float_type, [batch, hidden]),
        helper.make_tensor_value_info("query", float_type, [batch, HKV, D, G]),
        helper.make_tensor_value_info("ring", float_type, [batch, HKV, W, D]),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", float_type, [batch, HKV, W, G]),
        helper.make_tensor_value_info("ring.next", float_type, [batch, HKV, W, D]),
    ]
    return write_model(path, nodes, inputs, outputs, constants)


class TestBuild:
    pytestmark = needs_tensorrt

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("batch", [1, 2])
    def test_ring_is_updated_in_place(self, tmp_path: Path, dtype: str, batch: int) -> None:
        report = build_engine(ring_model(tmp_path / "ring.onnx", dtype, batch))
        assert report.in_place == (("ring", "ring.next"),)
        assert report.layer_types["KV_CACHE_UPDATE"] == 1
        assert report.layer_types["MATRIX_MULTIPLY"] == 2
        assert report.num_layers == sum(report.layer_types.values())
        assert report.inputs == ("position", "x", "query", "ring")
        assert report.outputs == ("logits", "ring.next")
        assert report.tensorrt and report.engine_bytes > 0 and report.parse_s > 0 and report.build_s > 0

    def test_engine_holds_the_external_weights(self, tmp_path: Path) -> None:
        """The built engine grows by the weights' bytes: they were found beside the graph."""
        small, large = tmp_path / "small", tmp_path / "large"
        small.mkdir()
        large.mkdir()
        a = build_engine(ring_model(small / "ring.onnx", "float32", 1, hidden=64))
        b = build_engine(ring_model(large / "ring.onnx", "float32", 1, hidden=64 * 1024))
        extra_bytes = (64 * 1024 - 64) * HKV * D * 4
        assert 0.9 * extra_bytes < b.engine_bytes - a.engine_bytes < 1.2 * extra_bytes

    def test_engine_file_is_what_was_counted(self, tmp_path: Path) -> None:
        target = tmp_path / "engines" / "ring.engine"
        report = build_engine(ring_model(tmp_path / "ring.onnx", "float32", 1), target)
        assert target.stat().st_size == report.engine_bytes
        assert [p.name for p in target.parent.iterdir()] == ["ring.engine"]

    def test_tactic_sources(self, tmp_path: Path) -> None:
        path = ring_model(tmp_path / "ring.onnx", "float32", 1)
        assert build_engine(path, options=BuildOptions(tactic_sources=0)).engine_bytes > 0
        with pytest.raises(UsageError, match="--tactic-sources: received 2147483648, expected bits of") as caught:
            build_engine_apart(path, tmp_path / "ring.engine", BuildOptions(tactic_sources=1 << 31))
        assert "\n" not in str(caught.value)

    def test_warnings_are_of_this_build_only(self, tmp_path: Path) -> None:
        path = ring_model(tmp_path / "ring.onnx", "float32", 1)
        first, second = build_engine(path), build_engine(path)
        assert first.warnings == second.warnings


class TestRefusals:
    pytestmark = needs_tensorrt

    def test_every_refused_node_is_named(self, tmp_path: Path) -> None:
        path = write_model(
            tmp_path / "bits.onnx",
            [
                helper.make_node("BitwiseAnd", ["p", "c"], ["y"], name="low_bits"),
                helper.make_node("Add", ["p", "c"], ["x"], name="fine"),
                helper.make_node("BitwiseOr", ["p", "c"], ["z"], name="high_bits"),
            ],
            [helper.make_tensor_value_info("p", TensorProto.INT64, [1])],
            [helper.make_tensor_value_info(n, TensorProto.INT64, [1]) for n in "xyz"],
            {"c": np.array([3], np.int64)},
        )
        with pytest.raises(BackendError) as caught:
            build_engine(path)
        message = str(caught.value)
        assert "node 0 BitwiseAnd 'low_bits'" in message
        assert "node 2 BitwiseOr 'high_bits'" in message
        assert "fine" not in message
        assert "\n" not in message

    def test_many_refusals_are_counted_not_listed(self, tmp_path: Path) -> None:
        count = engine.MAX_REPORTED_ERRORS + 3
        path = write_model(
            tmp_path / "bits.onnx",
            [helper.make_node("BitwiseAnd", ["p", "p"], [f"y{i}"]) for i in range(count)],
            [helper.make_tensor_value_info("p", TensorProto.INT64, [1])],
            [helper.make_tensor_value_info(f"y{i}", TensorProto.INT64, [1]) for i in range(count)],
        )
        with pytest.raises(BackendError, match=r"and 3 more, expected"):
            build_engine(path)

    def test_ring_that_is_no_graph_output_fails_to_build(self, tmp_path: Path) -> None:
        """The parser takes it; only the builder finds that the update could not be in place."""
        path = ring_model(tmp_path / "ring.onnx", "float32", 1)
        model = onnx.load(path, load_external_data=False)
        del model.graph.output[1]
        onnx.save(model, path)
        target = tmp_path / "ring.engine"
        with pytest.raises(BackendError, match="must be a network output"):
            build_engine(path, target)
        assert not target.exists()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["ring.onnx", "weights.bin"]

    def test_missing_weights_file(self, tmp_path: Path) -> None:
        path = ring_model(tmp_path / "ring.onnx", "float32", 1)
        (tmp_path / "weights.bin").unlink()
        with pytest.raises(BackendError, match=r"weights\.bin"):
            build_engine(path)

    def test_garbage_file(self, tmp_path: Path) -> None:
        path = tmp_path / "noise.onnx"
        path.write_bytes(b"\xff" * 64)
        with pytest.raises(BackendError, match=r"'noise\.onnx': received "):
            build_engine(path)

    def test_unwritable_place(self, tmp_path: Path) -> None:
        (tmp_path / "engines").write_text("a file, not a folder")
        with pytest.raises(UsageError, match="engine file: received"):
            build_engine(ring_model(tmp_path / "ring.onnx", "float32", 1), tmp_path / "engines" / "ring.engine")

    def test_full_disk_leaves_nothing_behind(self, tmp_path: Path) -> None:
        path = tmp_path / "graph" / "ring.onnx"
        path.parent.mkdir()
        ring_model(path, "float32", 1)
        target = tmp_path / "engines" / "ring.engine"
        with pytest.raises(UsageError, match="File too large"), largest_file(4096):
            build_engine(path, target)
        assert list(target.parent.iterdir()) == []


CRASHES = ("bloom", "mpt", "falcon-alibi", "codegen", "gpt_neox_japanese", "zamba")
"""TensorRT-RTX 1.7.1 crashes while it builds these, all of one query head a key head. MPT without sinks builds, and
with sinks but a mask without ALiBi's biases it crashes as well. HRM builds for one stream and crashes for two."""
SAME_OPERATORS = ("llama3-rope", "llama-linear-rope", "mistral", "phi3-partial", "falcon-groups", "qwen3_5_text")
"""Models with the operators of others: their graphs differ from those in constants alone."""
BUILT = [name for name in TINY if name not in (*CRASHES, *SAME_OPERATORS)]


class TestExportedGraphs:
    """What CI is for: a graph that TensorRT refuses must not be exported."""

    pytestmark = needs_tensorrt

    @pytest.mark.parametrize("name", nightly_but([name for name in DAILY if name in BUILT], BUILT))
    def test_every_family_builds(self, shared_export: SharedExports, name: str) -> None:
        bundle = shared_export(name, **DECODE_GRAPH)
        check_bundle(bundle.path, bundle.manifest)

    @pytest.mark.parametrize(
        "config",
        [
            ExportConfig(S, W, dtype="fp16", chunk_size=1),
            ExportConfig(S, W, batch=3, chunk_size=1),
            ExportConfig(0, W, chunk_size=1),
            ExportConfig(S, 1),
        ],
        ids=["fp16", "batch-3", "no-sinks", "window-1"],
    )
    def test_every_geometry_builds(self, tmp_path: Path, config: ExportConfig) -> None:
        loaded = LoadedModel(tiny_model("llama", dtype=getattr(torch, WEIGHT_DTYPES[config.dtype])), None, "llama")
        check_bundle(tmp_path / "bundle", export_loaded(loaded, tmp_path / "bundle", config))

    @pytest.mark.slow
    def test_scaled_and_shifted_weights_build(self, tmp_path: Path) -> None:
        """Step and chunk, in standard operators."""
        model = tiny_model("llama")
        affine = written(tmp_path / "file", random_tensors(model))
        config = ExportConfig(S, W, chunk_size=4, target="tensorrt", native=True, affine=affine)
        manifest = export_model(model, tmp_path / "bundle", config).manifest
        check_bundle(tmp_path / "bundle", manifest)
        assert build_engine(tmp_path / "bundle" / "prefill.onnx").engine_bytes > 0

    @pytest.mark.slow
    def test_smollm2_builds(self, tmp_path: Path) -> None:
        manifest = export(str(smollm2_file()), tmp_path / "bundle", ExportConfig(chunk_size=1))
        report = check_bundle(tmp_path / "bundle", manifest)
        assert report.layer_types["KV_CACHE_UPDATE"] == 2 * 30
        assert report.engine_bytes > 500e6  # 135 M parameters in fp32


@needs_tensorrt[0]
@needs_tensorrt[1]
def test_of_the_prefill_graph_only_the_circular_write_is_refused(tmp_path: Path) -> None:
    """Its window wraps inside a chunk. Once TensorRT takes that, or the graph does without, this test says so."""
    loaded = LoadedModel(tiny_model("llama"), None, "llama")
    export_loaded(loaded, tmp_path / "bundle", ExportConfig(S, W, chunk_size=4))
    with pytest.raises(BackendError) as caught:
        build_engine(tmp_path / "bundle" / "prefill.onnx")
    refused = re.findall(r"node \d+ (\w+)", str(caught.value))
    assert refused and set(refused) == {"TensorScatter"}


def check_bundle(bundle: Path, manifest: Manifest) -> EngineReport:
    """Build the decode graph; every window must be written in place, and every state be bound by its name."""
    report = build_engine(bundle / manifest.graphs["decode"].file)
    windows = {(s.input, s.output) for s in manifest.states if s.kind.startswith("window")}
    assert bool(windows) == bool(manifest.caches)  # a model without attention has none
    assert windows <= set(report.in_place)
    assert {"ids", "position", *(s.input for s in manifest.states)} == set(report.inputs)
    assert {"logits", *(s.output for s in manifest.states)} == set(report.outputs)
    return report


@contextlib.contextmanager
def largest_file(limit_bytes: int) -> Iterator[None]:
    """Let this process write no file beyond `limit_bytes`: a full disk, as a writer sees it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_missing_graph(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file at"):
        build_engine(tmp_path / "decode.onnx")


@pytest.mark.parametrize("failure", [ModuleNotFoundError("no such module"), OSError("libtensorrt_rtx.so.1: no\nfile")])
def test_missing_tensorrt_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(_name: str) -> None:
        raise failure

    monkeypatch.setattr(importlib, "import_module", fail)
    path = tmp_path / "decode.onnx"
    path.write_bytes(b"")
    with pytest.raises(BackendError, match=r"pip install 'sinkexport\[tensorrt\]'") as caught:
        build_engine(path)
    assert "\n" not in str(caught.value)


class Logging:
    """The least that a logger of TensorRT's derives from."""

    class Severity(enum.IntEnum):
        ERROR, WARNING = 1, 2


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """A stand-in for the package `tensorrt`, whose calls all succeed."""
    module = MagicMock(__version__="10.3.0", ILogger=Logging)
    module.__name__ = "tensorrt"
    monkeypatch.setattr(importlib, "import_module", lambda _name: module)
    return module


def test_no_driver_is_reported_with_tensorrts_reason(tmp_path: Path, tensorrt: MagicMock) -> None:
    def refuse(logger: Any) -> None:
        logger.log(Logging.Severity.ERROR, "CUDA initialization failure with error: 35\n")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    tensorrt.Builder = MagicMock(__name__="Builder", side_effect=refuse)
    with pytest.raises(BackendError, match=r"TensorRT's Builder: received CUDA .* 35, expected a GPU"):
        build_engine(ring_model(tmp_path / "ring.onnx", "float32", 1))


@pytest.mark.parametrize(("version", "has_registry"), [("8.5.3.1", False), ("8.6.1", False), ("10.3.0", True)])
def test_a_plugin_needs_the_builders_registry_from_tensorrt_10_on(
    version: str, has_registry: bool, tmp_path: Path, tensorrt: MagicMock
) -> None:
    """The builder of TensorRT 8.5 has none."""
    tensorrt.__version__ = version
    if not has_registry:
        del tensorrt.Builder.return_value.get_plugin_registry
    seen = []

    def load(_trt: Any, registry: Any, plugin: Path) -> str:
        seen.append((registry is not None, plugin))
        raise UsageError("enough")

    options = BuildOptions(plugin=tmp_path / "p.so")
    with pytest.raises(UsageError, match="enough"):
        build_engine(ring_model(tmp_path / "r.onnx", "float32", 1), options=options, load=load)
    assert seen == [(has_registry, tmp_path / "p.so")]


def test_tensorrt_8_without_cublas_is_named() -> None:
    """TensorRT 8.5.3 says no more of a recurrent layer's matmul than that it has no kernel."""
    line = "[optimizer.cpp::computeCosts::3728] Could not find any implementation for node {ForeignNode[a...b]}."
    assert "without cuBLAS 11" in engine.fix_of_failure(line, has_strong_types=False)
    assert "report it" in engine.fix_of_failure(line, has_strong_types=True)
    assert "report it" in engine.fix_of_failure("out of memory", has_strong_types=False)


@pytest.mark.parametrize("readable", [False, True])
def test_an_unfit_timing_cache(readable: bool, tmp_path: Path, tensorrt: MagicMock) -> None:
    """TensorRT makes none of a file that is none, and does not set one of another version or GPU."""
    config = tensorrt.Builder.return_value.create_builder_config.return_value
    config.set_timing_cache.return_value = False
    if not readable:
        config.create_timing_cache.return_value = None
        config.set_timing_cache.side_effect = TypeError("incompatible function arguments")
    (tmp_path / "cache").write_bytes(b"noise")
    with pytest.raises(UsageError, match=r"--timing-cache: received .*; choose a new file"):
        build_engine(
            ring_model(tmp_path / "r.onnx", "float32", 1), options=BuildOptions(timing_cache=tmp_path / "cache")
        )
    assert (tmp_path / "cache").read_bytes() == b"noise"


def test_importing_the_module_does_not_import_tensorrt() -> None:
    """`sinkexport --help` must not pay for 230 MB of shared libraries."""
    code = f"import sys, sinkexport.tensorrt.builder; sys.exit({MODULE!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
