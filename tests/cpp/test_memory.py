"""Bundles of target cpu in memory, in both runtimes: weights mapped once, states in one piece, what is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from sinkrt import Session
from sinkrt.backends.external_tensors import external_tensors
from sinkrt.backends.ort_graph import ALIGNMENT_BYTES

from tests.cpp.build import CppRuntime
from tests.exporter.tiny_models import tiny_tokenizer
from tests.mappings import mappings_of
from tests.runtime.toy import rehash
from tests.support import export_model, refused

pytestmark = pytest.mark.usefixtures("cpu_library")
GEOMETRY = {"num_sink_tokens": 2, "window_size": 14, "chunk_size": 4, "target": "cpu"}


@pytest.fixture(scope="module", params=[1, 3])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One or three streams, with a prefill graph."""
    folder = tmp_path_factory.mktemp("memory") / "bundle"
    export_model("llama", folder, tokenizer=tiny_tokenizer(), batch=request.param, **GEOMETRY)
    return folder


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def test_python_maps_weights_once(own_bundle: Path) -> None:
    """A copy is loaded: what exported the bundle has its weights mapped as well."""
    with Session.load(own_bundle, threads=1) as session:
        session.prefill(np.full((session.batch, 9), 5))
        session.step([6] * session.batch)
        assert mappings_of(own_bundle / "weights.bin") == 1
        starts = [session.buffers[state.input].ctypes.data for state in session.manifest.states]
        sizes = [session.buffers[state.input].nbytes for state in session.manifest.states]
        for start, size, following in zip(starts, sizes, starts[1:], strict=False):
            assert start % ALIGNMENT_BYTES == 0
            assert following == start + -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    assert mappings_of(own_bundle / "weights.bin") == 0


def test_every_large_weight_is_shared(bundle: Path) -> None:
    """What the reader finds is all that lies in the file, in both graphs."""
    size = (bundle / "weights.bin").stat().st_size
    covered = np.zeros(size, bool)
    for role in ("decode", "prefill"):
        initializers = onnx.load(bundle / f"{role}.onnx", load_external_data=False).graph.initializer
        tensors = external_tensors((bundle / f"{role}.onnx").read_bytes())
        assert len(tensors) == sum(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in initializers)
        for tensor in tensors:
            assert tensor.num_bytes is not None
            covered[tensor.offset : tensor.offset + tensor.num_bytes] = True
    assert covered.mean() > 0.5  # the rest is padding: tiny matrices start on pages


def test_cpp_maps_weights_once(cpp_runtime: CppRuntime, bundle: Path) -> None:
    done = cpp_runtime.run(cpp_runtime.programs / "memory", bundle)
    assert done.stdout == "weights 1 states together aligned\n", done.stdout + done.stderr


def test_a_file_that_is_replaced_stays_as_it_was(cpp_runtime: CppRuntime, own_bundle: Path, tmp_path: Path) -> None:
    size = (own_bundle / "weights.bin").stat().st_size
    (tmp_path / "other").write_bytes(bytes(size))
    done = cpp_runtime.run(cpp_runtime.programs / "memory", own_bundle, tmp_path / "other")
    assert done.stdout == "weights 1 states together aligned same\n", done.stdout + done.stderr
    shutil.copy(own_bundle / "weights.bin", tmp_path / "other")  # zeros
    rehash(own_bundle)
    with Session.load(own_bundle, threads=1) as session:
        ids = np.full((session.batch, 9), 5)
        before = session.prefill(ids).copy()
        (tmp_path / "other").write_bytes(b"\x01" * size)
        (tmp_path / "other").replace(own_bundle / "weights.bin")
        session.reset()
        np.testing.assert_array_equal(session.prefill(ids), before)


def test_weights_that_are_too_short(cpp_runtime: CppRuntime, own_bundle: Path) -> None:
    """Refused by the manifest's size; by the graph's, where the manifest has been made to fit."""
    os.truncate(own_bundle / "weights.bin", 100)
    for message in ("weights.bin: received 100 bytes", "a graph that ONNX Runtime refuses"):
        with refused(message):
            Session.load(own_bundle, threads=1)
        done = cpp_runtime.run(cpp_runtime.generate, own_bundle, "--prompt", "a")
        assert done.returncode == 2 and message in done.stderr, done.stderr
        rehash(own_bundle)


def test_weights_that_were_tampered_with(cpp_runtime: CppRuntime, own_bundle: Path) -> None:
    data = bytearray((own_bundle / "weights.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (own_bundle / "weights.bin").write_bytes(data)
    with refused("weights.bin: received sha256"):
        Session.load(own_bundle, threads=1)
    done = cpp_runtime.run(cpp_runtime.generate, own_bundle, "--prompt", "a")
    assert done.returncode == 2 and "weights.bin: received sha256" in done.stderr


def test_files_that_cannot_be_written(cpp_runtime: CppRuntime, own_bundle: Path) -> None:
    """Nothing of a bundle is written, as on a file system that is read-only."""
    for path in (*own_bundle.iterdir(), own_bundle):
        path.chmod(0o555 if path.is_dir() else 0o444)
    with Session.load(own_bundle, threads=1):
        assert mappings_of(own_bundle / "weights.bin") == 1
    done = cpp_runtime.run(cpp_runtime.programs / "memory", own_bundle)
    assert done.stdout == "weights 1 states together aligned\n", done.stdout + done.stderr
    own_bundle.chmod(0o755)
