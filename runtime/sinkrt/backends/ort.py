"""ONNX Runtime on the CPU or a GPU, with every input and output bound to a buffer that is allocated once."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from sinkrt.backends.base import StateArray
from sinkrt.backends.cuda import Cuda, Staged
from sinkrt.contract import Manifest, TensorSpec
from sinkrt.errors import BackendError, BundleError, problem

ALIGNMENT_BYTES = 64
"""A cache line, and what vector kernels like best."""

CUDA_PROVIDER = "CUDAExecutionProvider"

_ORT_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
    "int8": "tensor(int8)",
}


class Place(Protocol):
    """Where buffers lie and graphs are computed.

    providers: ONNX Runtime's execution providers, with their options.
    """

    providers: list[Any]

    def zeros(self, spec: TensorSpec) -> Any:
        """A tensor that graphs can be bound to.

        Zero: slots that hold no token yet are masked, but NaN times a weight of zero would be NaN.
        """
        ...

    def staged(self, spec: TensorSpec) -> Any:
        """A tensor that the host writes or reads: `host`, a NumPy array, and `device`, what graphs are bound to."""
        ...

    def row(self, array: Any, index: int) -> Any:
        """[1, ...]: the same memory."""
        ...

    def bind(self, bind: Any, name: str, array: Any) -> None:
        """Tie a tensor to an input or an output. bind: `bind_input` or `bind_output` of an IOBinding."""
        ...

    def run_options(self, binding_index: int) -> ort.RunOptions | None:
        """For the graph's binding of this number, from 0."""
        ...


class OrtBackend:
    """Implements `Backend`. Each state's input and output are one buffer, so TensorScatter writes its slots in place.

    threads: of one operator; None leaves the choice to ONNX Runtime (all physical cores).
    repack_prefill: a second copy of the weights, in the layout that products like best, makes prefill about a seventh
    faster (measured on a CPU with AVX-512). Without it the prefill graph reads the pages of the weights file, which are
    mapped and shared. None: if the copy takes no more than a quarter of the memory that is free.
    place: None: the CPU. not_recorded: what `Backend` tells by that name.

    Raises: BundleError if a graph is unreadable or is not what the manifest says; BackendError if ONNX Runtime
    cannot run it.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        threads: int | None,
        repack_prefill: bool | None = None,
        place: Place | None = None,
        not_recorded: str | None = None,
    ) -> None:
        self.not_recorded = not_recorded
        if repack_prefill is None:
            repack_prefill = manifest.weights_bytes <= available_bytes() // 4
        place = place or HostPlace()
        self._states = {s.input: place.zeros(TensorSpec(s.input, s.shape, s.dtype)) for s in manifest.states}
        graph = manifest.graphs["decode"]
        self._arrays = {spec.name: place.staged(spec) for spec in (*graph.inputs, *graph.outputs)}
        self._decode = _Graph(bundle, manifest, "decode", threads, place, repack=True)
        self._step = self._decode.bind({**_devices(self._arrays), **self._states}, 0)
        self._chunks: list[_Binding] = []  # by stream
        if prefill := manifest.graphs.get("prefill"):
            self._prefill = _Graph(bundle, manifest, "prefill", threads, place, repack=repack_prefill)
            self._chunk_inputs = {spec.name: place.staged(spec) for spec in prefill.inputs}
            for stream in range(manifest.stream.batch):
                # The prefill graph sees one stream: a row of each.
                rows = {"logits": self._arrays["logits"].device, **self._states}
                views = {name: place.row(array, stream) for name, array in rows.items()}
                self._chunks.append(self._prefill.bind({**_devices(self._chunk_inputs), **views}, stream))
        # ONNX Runtime allocates intermediate results in the first run: have that behind us when the stream starts.
        self.run()
        for stream in range(len(self._chunks)):
            self.run_chunk(stream, np.zeros(1, dtype=np.int64), 0)
        for state in self._states.values():
            state[...] = 0
        self.logits.fill(0)

    @property
    def ids(self) -> np.ndarray:
        return self._host("ids")

    @property
    def position(self) -> np.ndarray:
        return self._host("position")

    @property
    def logits(self) -> np.ndarray:
        return self._host("logits")

    @property
    def states(self) -> Mapping[str, StateArray]:
        return self._states

    def run(self) -> None:
        for name in ("ids", "position"):
            self._arrays[name].upload()
        self._step.run()
        self._arrays["logits"].download()

    def run_chunk(self, stream: int, ids: np.ndarray, position: int) -> None:
        inputs = self._chunk_inputs
        inputs["ids"].host[0, : ids.size] = ids
        inputs["ids"].host[0, ids.size :] = 0  # any token: what is not valid is computed and dropped
        inputs["position"].host[0], inputs["num_valid"].host[0] = position, ids.size
        for each in inputs.values():
            each.upload()
        # The host's logits are what counts: a loaded state, and rows that a step of others has left alone, are there.
        self._arrays["logits"].upload()
        self._chunks[stream].run()
        self._arrays["logits"].download()

    def _host(self, name: str) -> np.ndarray:
        array: np.ndarray = self._arrays[name].host
        return array


def load_on_gpu(bundle: Path, manifest: Manifest, threads: int | None) -> OrtBackend:
    """On the first GPU; each step is one CUDA graph if all nodes of the graphs have kernels there.

    Raises: as OrtBackend, and BackendError if there is no GPU or this onnxruntime cannot use it.
    """
    if CUDA_PROVIDER not in ort.get_available_providers():
        raise BackendError(
            problem(
                "backend 'ort-cuda'",
                received=f"onnxruntime {ort.__version__} for the CPU",
                expected="onnxruntime-gpu",
                fix="pip uninstall onnxruntime, then pip install 'sinkexport[cuda]': they share one folder",
            )
        )
    cuda = Cuda()
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find; a session tells that better
            ort.preload_dlls()
    ort.set_default_logger_severity(4)
    try:
        return OrtBackend(bundle, manifest, threads, False, CudaPlace(cuda, graphs=True))
    except (BackendError, BundleError) as error:  # some node stays on the CPU, or something else: then it comes again
        reason = str(error)
    # Not in that block: the error's traceback holds the first attempt's weights, and there may be no room for two.
    try:
        return OrtBackend(bundle, manifest, threads, False, CudaPlace(cuda, graphs=False), reason)
    except (BackendError, BundleError) as error:
        if "cudnn" not in str(error.__cause__).lower():
            raise
        raise BackendError(
            problem(
                "backend 'ort-cuda'",
                received=_first_line(error.__cause__ or error),
                expected="cuDNN 9, or what this onnxruntime-gpu was built for",
                fix="pip install 'sinkexport[cuda]'",
            )
        ) from error


class HostPlace:
    """The CPU and its memory."""

    def __init__(self) -> None:
        self.providers: list[Any] = ["CPUExecutionProvider"]

    def zeros(self, spec: TensorSpec) -> np.ndarray:
        """Aligned."""
        raw = np.empty(spec.nbytes + ALIGNMENT_BYTES, dtype=np.uint8)
        raw.fill(0)  # touches every page now; np.zeros would leave that to the first write
        start = -raw.ctypes.data % ALIGNMENT_BYTES
        return raw[start : start + spec.nbytes].view(spec.dtype).reshape(spec.shape)

    def staged(self, spec: TensorSpec) -> _HostArray:
        return _HostArray(self.zeros(spec))

    def row(self, array: np.ndarray, index: int) -> np.ndarray:
        return array[index : index + 1]

    def bind(self, bind: Any, name: str, array: np.ndarray) -> None:
        bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def run_options(self, _binding_index: int) -> ort.RunOptions | None:
        return None


@dataclasses.dataclass(frozen=True)
class _HostArray:
    """Host and device are one."""

    host: np.ndarray

    @property
    def device(self) -> np.ndarray:
        return self.host

    def upload(self) -> None:
        """Nothing to do."""

    def download(self) -> None:
        """Nothing to do."""


class CudaPlace:
    """The first GPU and its memory.

    graphs: record each binding as a CUDA graph; ONNX Runtime refuses that if a node has no kernel on the GPU.
    """

    def __init__(self, cuda: Cuda, *, graphs: bool) -> None:
        self._cuda, self._graphs = cuda, graphs
        options = {
            "device_id": "0",
            "enable_cuda_graph": "1" if graphs else "0",
            "arena_extend_strategy": "kSameAsRequested",  # not the next power of two: weights are most of it
            "use_tf32": "0",  # float32 is to mean float32
        }
        # What has no kernel there runs on the CPU; with a CUDA graph nothing may.
        self.providers: list[Any] = [(CUDA_PROVIDER, options), "CPUExecutionProvider"]

    def zeros(self, spec: TensorSpec) -> Any:
        return self._cuda.zeros(spec)

    def staged(self, spec: TensorSpec) -> Staged:
        return Staged(self._cuda, spec)

    def row(self, array: Any, index: int) -> Any:
        return array.row(index)

    def bind(self, bind: Any, name: str, array: Any) -> None:
        bind(name, "cuda", 0, array.dtype, array.shape, array.address)

    def run_options(self, binding_index: int) -> ort.RunOptions | None:
        if not self._graphs:
            return None
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(binding_index + 1))  # one for each set of addresses
        return options


class _Graph:
    """One graph of the bundle, loaded."""

    def __init__(
        self, bundle: Path, manifest: Manifest, role: str, threads: int | None, place: Place, *, repack: bool
    ) -> None:
        graph = manifest.graphs[role]
        batch = graph.inputs[0].shape[0]
        self._role, self._states, self._graph, self._place = role, manifest.states, graph, place
        self._session = open_graph(bundle / graph.file, threads, place.providers, repack=repack)
        shapes = {state.input: (batch, *state.shape[1:]) for state in manifest.states}
        state_inputs = [TensorSpec(s.input, shapes[s.input], s.dtype) for s in manifest.states]
        state_outputs = [TensorSpec(s.output, shapes[s.input], s.dtype) for s in manifest.states]
        _compare("input", self._session.get_inputs(), [*graph.inputs, *state_inputs])
        _compare("output", self._session.get_outputs(), [*graph.outputs, *state_outputs])

    def bind(self, arrays: Mapping[str, Any], index: int) -> _Binding:
        """Tie the graph to buffers: inputs and outputs by name, states by the names of their inputs.

        index: of this binding among the graph's.
        """
        binding, place = self._session.io_binding(), self._place
        for spec in self._graph.inputs:
            place.bind(binding.bind_input, spec.name, arrays[spec.name])
        for spec in self._graph.outputs:
            place.bind(binding.bind_output, spec.name, arrays[spec.name])
        for state in self._states:
            place.bind(binding.bind_input, state.input, arrays[state.input])
            place.bind(binding.bind_output, state.output, arrays[state.input])
        return _Binding(self._role, self._session, binding, place.run_options(index), arrays)


@dataclasses.dataclass(frozen=True)
class _Binding:
    """A graph with its buffers, ready to run any number of times."""

    role: str
    session: ort.InferenceSession
    binding: ort.IOBinding
    options: ort.RunOptions | None
    arrays: Mapping[str, Any]  # bound by address: they must live as long

    def run(self) -> None:
        """Raises: BackendError."""
        try:
            self.session.run_with_iobinding(self.binding, self.options)
        except Exception as error:  # ONNX Runtime's errors have no common base but this
            raise BackendError(
                problem(
                    f"{self.role} run",
                    received=_first_line(error),
                    expected="a run without error",
                    fix="reset or reload the session",
                )
            ) from error


def open_graph(path: Path, threads: int | None, providers: list[Any], *, repack: bool = True) -> ort.InferenceSession:
    """repack: copy the weights to the layout that ONNX Runtime's products like best."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # nothing on stderr: errors are raised, and told in one line by whoever catches
    # One graph, one stream of nodes: the threads serve single operators.
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Threads spin while a step runs and sleep between steps: the host has other work to do on its cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Graphs for TensorRT have Q/DQ nodes: they are computed as they stand. The INT8 products that ONNX Runtime makes of
    # them round inputs that the graph does not round, and saturate at 16 bits on x86 without VNNI.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not repack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = ort.InferenceSession(path, options, providers=providers)
    except Exception as error:
        raise BundleError(
            problem(
                path.name,
                received=f"a graph that ONNX Runtime refuses ({_first_line(error)})",
                expected="a graph that 'sinkexport export' wrote",
                fix="export the model again",
            )
        ) from error
    wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if session.get_providers()[0] != wanted:  # ONNX Runtime goes on without a provider that it cannot load
        raise BackendError(
            problem(
                path.name,
                received=f"no {wanted}: its libraries cannot be loaded",
                expected="CUDA 13 and cuDNN 9, or what this onnxruntime-gpu was built for",
                fix="pip install 'sinkexport[cuda]'",
            )
        )
    return session


def _devices(staged: Mapping[str, Any]) -> dict[str, Any]:
    return {name: each.device for name, each in staged.items()}


def _compare(kind: str, found: list[ort.NodeArg], wanted: list[TensorSpec]) -> None:
    """The graph must have exactly the tensors that the manifest names."""
    actual = {arg.name: (tuple(arg.shape), arg.type) for arg in found}
    expected = {spec.name: (spec.shape, _ORT_TYPES[spec.dtype]) for spec in wanted}
    for name in [*expected, *actual]:
        if actual.get(name) != expected.get(name):
            raise BundleError(
                problem(
                    f"graph {kind} '{name}'",
                    received=actual.get(name, "nothing"),
                    expected=str(expected.get(name, "nothing")),
                    fix="graph and manifest differ: export again",
                )
            )


def available_bytes() -> int:
    """Memory that is free or can be freed at once; 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").split("\n")
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
