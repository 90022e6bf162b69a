"""ONNX Runtime on the CPU, with every input and output bound to a buffer that is allocated once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from sinkrt.contract import Manifest, TensorSpec
from sinkrt.errors import BackendError, BundleError, problem

ALIGNMENT_BYTES = 64
"""A cache line, and what vector kernels like best."""

_ORT_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
    "int8": "tensor(int8)",
}


class OrtBackend:
    """Implements `Backend`. Each state's input and output are one buffer, so TensorScatter writes its slots in place.

    threads: of one operator; None leaves the choice to ONNX Runtime (all physical cores).
    repack_prefill: a second copy of the weights, in the layout that products like best, makes prefill about a seventh
    faster (measured on a CPU with AVX-512). Without it the prefill graph reads the pages of the weights file, which are
    mapped and shared. None: if the copy takes no more than a quarter of the memory that is free.

    Raises: BundleError if a graph is unreadable or is not what the manifest says; BackendError if ONNX Runtime
    cannot run it.
    """

    def __init__(
        self, bundle: Path, manifest: Manifest, threads: int | None, repack_prefill: bool | None = None
    ) -> None:
        if repack_prefill is None:
            repack_prefill = manifest.weights_bytes <= available_bytes() // 4
        self._states = {s.input: zeros(TensorSpec(s.input, s.shape, s.dtype)) for s in manifest.states}
        graph = manifest.graphs["decode"]
        self._arrays = {spec.name: zeros(spec) for spec in (*graph.inputs, *graph.outputs)}
        self._decode = _Graph(bundle, manifest, "decode", threads, repack=True)
        self._step = self._decode.bind({**self._arrays, **self._states})
        self._chunks: list[_Binding] = []  # by stream
        if prefill := manifest.graphs.get("prefill"):
            self._prefill = _Graph(bundle, manifest, "prefill", threads, repack=repack_prefill)
            self._chunk_inputs = {spec.name: zeros(spec) for spec in prefill.inputs}
            for stream in range(manifest.stream.batch):
                rows = {"logits": self.logits, **self._states}  # the prefill graph sees one stream: a row of each
                views = {name: array[stream : stream + 1] for name, array in rows.items()}
                self._chunks.append(self._prefill.bind({**self._chunk_inputs, **views}))
        # ONNX Runtime allocates intermediate results in the first run: have that behind us when the stream starts.
        self.run()
        for stream in range(len(self._chunks)):
            self.run_chunk(stream, np.zeros(1, dtype=np.int64), 0)
        for array in (self.logits, *self._states.values()):
            array.fill(0)

    @property
    def ids(self) -> np.ndarray:
        return self._arrays["ids"]

    @property
    def position(self) -> np.ndarray:
        return self._arrays["position"]

    @property
    def logits(self) -> np.ndarray:
        return self._arrays["logits"]

    @property
    def states(self) -> Mapping[str, np.ndarray]:
        return self._states

    def run(self) -> None:
        self._step.run()

    def run_chunk(self, stream: int, ids: np.ndarray, position: int) -> None:
        inputs = self._chunk_inputs
        inputs["ids"][0, : ids.size] = ids
        inputs["ids"][0, ids.size :] = 0  # any token: what is not valid is computed and dropped
        inputs["position"][0], inputs["num_valid"][0] = position, ids.size
        self._chunks[stream].run()


class _Graph:
    """One graph of the bundle, loaded."""

    def __init__(self, bundle: Path, manifest: Manifest, role: str, threads: int | None, *, repack: bool) -> None:
        graph = manifest.graphs[role]
        batch = graph.inputs[0].shape[0]
        self._role, self._states, self._graph = role, manifest.states, graph
        self._session = open_graph(bundle / graph.file, threads, repack=repack)
        shapes = {state.input: (batch, *state.shape[1:]) for state in manifest.states}
        state_inputs = [TensorSpec(s.input, shapes[s.input], s.dtype) for s in manifest.states]
        state_outputs = [TensorSpec(s.output, shapes[s.input], s.dtype) for s in manifest.states]
        _compare("input", self._session.get_inputs(), [*graph.inputs, *state_inputs])
        _compare("output", self._session.get_outputs(), [*graph.outputs, *state_outputs])

    def bind(self, arrays: Mapping[str, np.ndarray]) -> _Binding:
        """Tie the graph to buffers: inputs and outputs by name, states by the names of their inputs."""
        # An OrtValue over NumPy memory: no copy, the array and ONNX Runtime see the same bytes.
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        binding = self._session.io_binding()
        for spec in self._graph.inputs:
            binding.bind_ortvalue_input(spec.name, values[spec.name])
        for spec in self._graph.outputs:
            binding.bind_ortvalue_output(spec.name, values[spec.name])
        for state in self._states:
            binding.bind_ortvalue_input(state.input, values[state.input])
            binding.bind_ortvalue_output(state.output, values[state.input])
        return _Binding(self._role, self._session, binding)


@dataclasses.dataclass(frozen=True)
class _Binding:
    """A graph with its buffers, ready to run any number of times."""

    role: str
    session: ort.InferenceSession
    binding: ort.IOBinding

    def run(self) -> None:
        """Raises: BackendError."""
        try:
            self.session.run_with_iobinding(self.binding)
        except Exception as error:  # ONNX Runtime's errors have no common base but this
            raise BackendError(
                problem(f"{self.role} run", received=_first_line(error), expected="a run without error",
                        fix="reset or reload the session")
            ) from error  # fmt: skip


def open_graph(path: Path, threads: int | None, *, repack: bool = True) -> ort.InferenceSession:
    """repack: copy the weights to the layout that ONNX Runtime's products like best."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # nothing on stderr: errors are raised, and told in one line by whoever catches
    # One graph, one stream of nodes: the threads serve single operators.
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Threads spin while a step runs and sleep between steps: the host has other work to do on its cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not repack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BundleError(
            problem(path.name, received=f"a graph that ONNX Runtime refuses ({_first_line(error)})",
                    expected="a graph that 'sinkexport export' wrote", fix="export the model again")
        ) from error  # fmt: skip


def _compare(kind: str, found: list[ort.NodeArg], wanted: list[TensorSpec]) -> None:
    """The graph must have exactly the tensors that the manifest names."""
    actual = {arg.name: (tuple(arg.shape), arg.type) for arg in found}
    expected = {spec.name: (spec.shape, _ORT_TYPES[spec.dtype]) for spec in wanted}
    for name in [*expected, *actual]:
        if actual.get(name) != expected.get(name):
            raise BundleError(
                problem(f"graph {kind} '{name}'", received=actual.get(name, "nothing"),
                        expected=str(expected.get(name, "nothing")), fix="graph and manifest differ: export again")
            )  # fmt: skip


def zeros(spec: TensorSpec) -> np.ndarray:
    """Aligned, and zero: slots that hold no token yet are masked, but NaN times a weight of zero would be NaN."""
    raw = np.empty(spec.nbytes + ALIGNMENT_BYTES, dtype=np.uint8)
    raw.fill(0)  # touches every page now; np.zeros would leave that to the first write
    start = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[start : start + spec.nbytes].view(spec.dtype).reshape(spec.shape)


def available_bytes() -> int:
    """Memory that is free or can be freed at once; 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
