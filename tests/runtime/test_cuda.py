"""What backends do on a GPU, over a stand-in for CUDA's runtime that notices uses of freed memory (fake_cudart.c)."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import onnxruntime as ort
import pytest
from sinkrt.backends.cuda import Cuda, DeviceArray, Staged
from sinkrt.backends.ort import OrtBackend
from sinkrt.backends.ort_cuda import CudaDevice, load_on_gpu
from sinkrt.backends.ort_graph import Binding
from sinkrt.backends.tensorrt import TensorrtBackend
from sinkrt.contract import EngineFacts, Manifest, TensorSpec, hash_file, load_manifest
from sinkrt.errors import BackendError

from tests.runtime.toy import Toy, build_toy

COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(
    COMPILER is None and not os.environ.get("SINKEXPORT_NO_SKIP"), reason="needs a C compiler: no cc on the PATH"
)
ROWS = TensorSpec("rows", (3, 2, 5), "float32")
NO_DRIVER = 35


class Books:
    """The stand-in's variables, as attributes."""

    def __init__(self, library: ctypes.CDLL) -> None:
        object.__setattr__(self, "_library", library)

    def __getattr__(self, name: str) -> int:
        return self._variable(name).value

    def __setattr__(self, name: str, value: int) -> None:
        self._variable(name).value = value

    def _variable(self, name: str) -> Any:
        kind = ctypes.c_size_t if name.endswith("_bytes") else ctypes.c_int
        return kind.in_dll(self._library, f"fake_{name}")

    @property
    def alive(self) -> tuple[int, int, int]:
        """Blocks of memory, graphs, streams."""
        return self.live_blocks, self.live_graphs, self.live_streams


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("cudart") / "fake.so"
    done = subprocess.run(
        [
            COMPILER or "cc",
            "-std=c11",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-shared",
            "-fPIC",
            str(Path(__file__).parent / "fake_cudart.c"),
            "-o",
            str(library),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return library


@pytest.fixture
def library(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The stand-in, found as NVIDIA's package is. A copy for each test: what another has left does not count here."""
    path = tmp_path / "packages/nvidia/cu13/lib/libcudart.so.13"
    path.parent.mkdir(parents=True)
    shutil.copyfile(compiled, path)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    return ctypes.CDLL(str(path))


@pytest.fixture
def books(library: ctypes.CDLL) -> Iterator[Books]:
    # All is to be freed with its last reference: what waits for the collector holds a GPU's memory for nothing.
    gc.disable()
    try:
        yield Books(library)
    finally:
        gc.enable()


@pytest.fixture
def cuda(books: Books) -> list[Cuda]:
    """In a list, so that a test can drop the last reference."""
    return [Cuda()]


def counted(spec: TensorSpec) -> np.ndarray:
    return np.arange(np.prod(spec.shape)).reshape(spec.shape).astype(spec.dtype)


def test_the_device(cuda: list[Cuda], books: Books) -> None:
    assert cuda[0].compute_capability == "9.0"
    assert cuda[0].stream
    assert books.alive == (0, 0, 1)
    cuda.clear()
    assert books.alive == (0, 0, 0)


@pytest.mark.parametrize(
    ("devices", "error", "problem"),
    [
        (0, 0, "received none"),
        (1, NO_DRIVER, "received CUDA driver version is insufficient"),
    ],
)
def test_no_device(devices: int, error: int, problem: str, books: Books) -> None:
    books.devices, books.count_error = devices, error
    with pytest.raises(BackendError, match=problem) as caught:
        Cuda()
    assert "\n" not in str(caught.value)
    assert books.alive == (0, 0, 0)


class TestMemory:
    def test_rows_are_read_and_written(self, cuda: list[Cuda], books: Books) -> None:
        array, wanted = cuda[0].zeros(ROWS), np.zeros(ROWS.shape, np.float32)
        assert (array.nbytes, array.itemsize, array.address % 256) == (120, 4, 0)
        assert np.array_equal(array, wanted)
        for key, value in (
            (..., counted(ROWS)),
            (1, 7.0),
            (slice(1, 3), 8.0),
            (np.array([2, 0]), counted(ROWS)[:2]),
            (np.array([False, True, False]), 9.0),
            (np.array([], np.int64), 1.0),
        ):
            array[key] = wanted[key] = value
            assert np.array_equal(array, wanted)
            assert np.array_equal(array[key], wanted[key])
        row = array.row(1)
        row[...] = 3.0
        wanted[1:2] = 3.0
        assert np.array_equal(array, wanted)
        del array  # the row still refers to it
        assert np.array_equal(row, wanted[1:2])
        with pytest.raises(ValueError, match="makes a copy"):
            np.array(row, copy=False)
        del row
        assert (books.mistakes, books.alive) == (0, (0, 0, 1))

    def test_pinned_memory_lives_as_long_as_an_array(self, cuda: list[Cuda], books: Books) -> None:
        array = cuda[0].pinned(ROWS)
        assert not array.any()
        view = array[1]
        del array
        view[...] = 5
        assert books.live_blocks == 1
        assert view.sum() == 50
        del view
        assert (books.mistakes, books.live_blocks) == (0, 0)

    def test_copies(self, cuda: list[Cuda], books: Books) -> None:
        staged, other = Staged(cuda[0], ROWS), cuda[0].zeros(ROWS)
        staged.host[...] = counted(ROWS)
        staged.upload()
        cuda[0].on_device(other.address, staged.device.address, other.nbytes)
        cuda[0].synchronize()
        staged.host[...] = 0
        staged.download()
        assert np.array_equal(staged.host, counted(ROWS))
        assert np.array_equal(other, counted(ROWS))
        assert books.mistakes == 0

    def test_freed_memory_is_not_touched_unnoticed(self, cuda: list[Cuda], books: Books) -> None:
        """The stand-in does its part."""
        array, other = cuda[0].zeros(ROWS), cuda[0].zeros(ROWS)
        address = array.address
        del array
        with pytest.raises(BackendError, match="cudaMemcpyAsync: received an error"):
            cuda[0].on_device(other.address, address, other.nbytes)
        with pytest.raises(BackendError, match="cudaMemcpy: received an error"):
            cuda[0].to_device(address, counted(ROWS))
        assert books.mistakes == 2

    @pytest.mark.parametrize("make", ["zeros", "pinned"])
    def test_too_little(self, make: str, cuda: list[Cuda], books: Books) -> None:
        kept = cuda[0].zeros(ROWS)
        books.room_bytes = 200
        huge = TensorSpec("window_k.0", (1 << 46,), "int8") if make == "pinned" else ROWS
        with pytest.raises(BackendError, match=f"GPU memory: received too little for '{huge.name}'") as caught:
            getattr(cuda[0], make)(huge)
        assert "\n" not in str(caught.value)
        assert np.array_equal(kept, np.zeros(ROWS.shape))
        assert (books.mistakes, books.live_blocks, books.live_bytes) == (0, 1, ROWS.nbytes)


class TestRecord:
    def test_a_replay_is_what_a_run_is(self, cuda: list[Cuda], books: Books) -> None:
        source, between, target = (cuda[0].zeros(ROWS) for _ in range(3))

        def work() -> None:
            cuda[0].on_device(between.address, source.address, source.nbytes)
            cuda[0].on_device(target.address, between.address, source.nbytes)

        replay = cuda[0].record(work)
        assert replay is not None
        assert not np.any(target)  # recording runs nothing
        for value in (1.0, 2.0):
            source[...] = value
            replay()
            cuda[0].synchronize()
            replayed = np.array(target)
            target[...] = 0
            work()
            assert np.array_equal(target, replayed)
            assert (replayed == value).all()
        assert (books.launches, books.mistakes) == (2, 0)

    def test_it_keeps_the_buffers_that_only_it_uses(self, cuda: list[Cuda], books: Books) -> None:
        source, target = cuda[0].zeros(ROWS), cuda[0].zeros(ROWS)

        def through_a_buffer(device: Cuda, source: DeviceArray, target: DeviceArray) -> Any:
            between = device.zeros(ROWS)

            def work() -> None:
                device.on_device(between.address, source.address, between.nbytes)
                device.on_device(target.address, between.address, between.nbytes)

            return device.record(work)

        replay = through_a_buffer(cuda[0], source, target)
        gc.collect()
        source[...] = counted(ROWS)
        replay()
        cuda[0].synchronize()
        assert np.array_equal(target, counted(ROWS))
        del source, target
        cuda.clear()
        assert books.alive == (3, 1, 1)  # all that the graph uses
        del replay
        assert (books.mistakes, books.alive) == (0, (0, 0, 0))

    @pytest.mark.parametrize("failing", ["copy to the host", "other refusal"])
    def test_what_cannot_be_recorded(self, failing: str, cuda: list[Cuda], books: Books) -> None:
        array, other = cuda[0].zeros(ROWS), cuda[0].zeros(ROWS)

        def work() -> None:
            cuda[0].on_device(other.address, array.address, array.nbytes)
            if failing == "other refusal":
                raise BackendError("a run that TensorRT refuses")
            np.array(array)

        assert cuda[0].record(work) is None
        assert books.live_graphs == 0
        array[...] = 4.0  # what comes after is as if nothing had been
        cuda[0].on_device(other.address, array.address, array.nbytes)
        cuda[0].synchronize()
        assert (np.array(other) == 4).all()
        assert cuda[0].record(lambda: cuda[0].on_device(other.address, array.address, 4)) is not None
        assert books.mistakes == 0

    def test_an_interrupt_ends_the_recording(self, cuda: list[Cuda], books: Books) -> None:
        def work() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cuda[0].record(work)
        assert np.array_equal(cuda[0].zeros(ROWS), np.zeros(ROWS.shape))
        assert (books.mistakes, books.live_graphs) == (0, 0)


class Context:
    """An execution context of TensorRT's: a run copies the first number of a state to the first of the logits.

    library: the stand-in for CUDA's runtime.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.addresses: dict[str, int] = {}
        self.library = library

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        target, source = (ctypes.c_void_p(self.addresses[name]) for name in ("logits", "sink_k.0"))
        size, on_device = ctypes.c_size_t(4), 3
        return not self.library.cudaMemcpyAsync(target, source, size, on_device, ctypes.c_void_p(stream))


def stand_in(manifest: Manifest, role: str, library: ctypes.CDLL) -> Any:
    """What `runtime.deserialize_cuda_engine` makes."""
    graph = manifest.graphs[role]
    states = [name for state in manifest.states for name in (state.input, state.output)]
    names = [*(spec.name for spec in (*graph.inputs, *graph.outputs)), *states]
    return SimpleNamespace(
        num_io_tensors=len(names),
        get_tensor_name=names.__getitem__,
        create_execution_context=lambda: Context(library),
    )


def engine_facts(bundle: Path, manifest: Manifest, role: str) -> EngineFacts:
    """Write an engine whose content is its role, built for the stand-in's GPU."""
    path = bundle / f"{role}.engine"
    path.write_text(role)
    file, graph = hash_file(path), manifest.files[manifest.graphs[role].file]
    return EngineFacts(
        file=path.name,
        bytes=file.bytes,
        sha256=file.sha256,
        graph_sha256=graph.sha256,
        flavour="TensorRT",
        version="10.3.0",
        plugin_abi=None,
        gpu=None,
        compute_capability="9.0",
        precision="float32",
    )


class TestTensorrt:
    @pytest.fixture
    def backend(
        self, books: Books, library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> list[TensorrtBackend]:
        """A batch of two, so that the second stream's row of logits does not lie where TensorRT wants addresses."""
        bundle = build_toy(tmp_path / "b", Toy(batch=2, chunk_size=4))
        manifest = load_manifest(bundle)
        engines = {role: engine_facts(bundle, manifest, role) for role in manifest.graphs}
        manifest = dataclasses.replace(manifest, engines=engines)
        trt = MagicMock(__version__="10.3.0", ILogger=object)
        trt.Runtime = lambda _logger: SimpleNamespace(
            deserialize_cuda_engine=lambda content: stand_in(manifest, content.decode(), library)
        )
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        return [TensorrtBackend(bundle, manifest)]

    def test_runs_are_replays_and_all_is_freed_with_the_session(
        self, backend: list[TensorrtBackend], books: Books
    ) -> None:
        assert backend[0].not_recorded is None
        launches = books.launches
        gc.collect()
        backend[0].states["sink_k.0"][...] = np.array([5, 6]).reshape(2, 1, 1, 1)
        backend[0].run()
        assert backend[0].logits[0, 0] == 5
        for stream in range(2):
            backend[0].logits[...] = 1
            backend[0].run_chunk(stream, np.array([1, 2, 3]), 0)
            assert backend[0].logits[:, 0].tolist() == [[5, 1], [1, 6]][stream]
            assert (backend[0].logits[:, 1:] == 1).all()
        assert books.launches - launches == 3
        assert books.mistakes == 0
        backend.clear()
        assert (books.mistakes, books.alive) == (0, (0, 0, 0))


class HostGraphs(CudaDevice):
    """The stand-in's device memory is the host's: ONNX Runtime on the CPU computes there.

    refused: CUDA graphs are, as by ONNX Runtime if a node has no kernel on the GPU.
    """

    provider, refused = "CPUExecutionProvider", False

    def __init__(self, cuda: Cuda, *, graphs: bool) -> None:
        super().__init__(cuda, graphs=graphs)
        self.providers = [self.provider]

    def bind(self, bind: Any, name: str, array: Any) -> None:
        bind(name, "cpu", 0, array.dtype, array.shape, array.address)

    def run_options(self, binding_index: int) -> Any:
        options = super().run_options(binding_index)
        if options is not None and self.refused:
            raise BackendError("decode.onnx: received a node on the CPU")
        return None


class TestOrtCuda:
    @pytest.fixture
    def bundle(self, books: Books, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)
        monkeypatch.setattr(ort, "set_default_logger_severity", lambda _level: None)
        return build_toy(tmp_path / "b", Toy(batch=2, chunk_size=4))

    @pytest.mark.parametrize("refused", [False, True])
    def test_it_computes_what_the_cpu_does(
        self, refused: bool, bundle: Path, books: Books, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(HostGraphs, "refused", refused)
        manifest = load_manifest(bundle)
        on_gpu, on_cpu = load_on_gpu(bundle, manifest, 1, HostGraphs), OrtBackend(bundle, manifest, 1, False)
        assert on_cpu.not_recorded is None
        assert on_gpu.not_recorded == ("decode.onnx: received a node on the CPU" if refused else None)
        for backend in (on_gpu, on_cpu):
            backend.run_chunk(1, np.array([3, 1, 2]), 0)
            backend.ids[...], backend.position[...] = [[5], [6]], [0, 3]
            backend.run()
        assert np.array_equal(on_gpu.logits, on_cpu.logits)
        assert all(np.array_equal(on_gpu.states[name], state) for name, state in on_cpu.states.items())
        del on_gpu, backend
        assert (books.mistakes, books.alive) == (0, (0, 0, 0))

    def test_without_graphs_there_need_not_be_room_for_two(
        self, bundle: Path, books: Books, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manifest = load_manifest(bundle)
        backend = load_on_gpu(bundle, manifest, 1, HostGraphs)
        books.room_bytes = books.live_bytes
        del backend
        assert books.live_bytes == 0
        monkeypatch.setattr(HostGraphs, "refused", True)
        assert load_on_gpu(bundle, manifest, 1, HostGraphs).not_recorded

    def test_cudnn_is_named(self, bundle: Path, books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> None:
            cause = RuntimeError(f"{'x' * 300} CUDNN failure 1001: CUDNN_STATUS_NOT_INITIALIZED")
            raise BackendError("decode run: received xxx") from cause

        monkeypatch.setattr(Binding, "run", fail)
        with pytest.raises(BackendError, match=r"expected cuDNN 9, .*pip install 'sinkexport\[cuda\]'") as caught:
            load_on_gpu(bundle, load_manifest(bundle), 1, HostGraphs)
        assert "\n" not in str(caught.value)
