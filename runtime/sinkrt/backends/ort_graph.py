"""Graphs of a bundle in ONNX Runtime, bound to buffers on a device: opened, compared with the manifest, run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from sinkrt.backends.state_memory import ALIGNMENT_BYTES, states_in_one_piece
from sinkrt.backends.weights import SharedWeights
from sinkrt.contract import Manifest, TensorSpec
from sinkrt.contract.constants import LAYOUT_METADATA, THREADS_OPTION, VERIFY
from sinkrt.contract.layout import graph_layout
from sinkrt.errors import BackendError, BundleError, problem

_ORT_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
    "int8": "tensor(int8)",
}


class Device(Protocol):
    """A device: holds buffers and computes graphs.

    providers: ONNX Runtime's execution providers, with their options.
    """

    providers: list[Any]

    def zeros(self, spec: TensorSpec) -> Any:
        """Allocate a tensor that graphs can be bound to.

        Zero: slots that hold no token yet are masked, but NaN times a weight of zero would be NaN.
        """
        ...

    def states(self, specs: Sequence[TensorSpec]) -> Sequence[Any]:
        """Allocate the states of a session, zero like the tensors of `zeros`."""
        ...

    def staged(self, spec: TensorSpec) -> Any:
        """Allocate a tensor that the host writes or reads.

        Its `host` is a NumPy array, and graphs are bound to its `device`.
        """
        ...

    def row(self, array: Any, index: int) -> Any:
        """Row of that index, [1, ...]: the same memory."""
        ...

    def bind(self, bind: Any, name: str, array: Any) -> None:
        """Tie a tensor to an input or an output. bind: `bind_input` or `bind_output` of an IOBinding."""
        ...

    def run_options(self, binding_index: int) -> ort.RunOptions | None:
        """Options for the graph's binding of this number, from 0."""
        ...


class HostDevice:
    """The CPU and its memory: implements `Device`."""

    def __init__(self) -> None:
        self.providers: list[Any] = ["CPUExecutionProvider"]

    def zeros(self, spec: TensorSpec) -> np.ndarray:
        """A NumPy array at a multiple of ALIGNMENT_BYTES."""
        raw = np.empty(spec.nbytes + ALIGNMENT_BYTES, dtype=np.uint8)
        raw.fill(0)  # touches every page now; np.zeros would leave that to the first write
        start = -raw.ctypes.data % ALIGNMENT_BYTES
        return raw[start : start + spec.nbytes].view(spec.dtype).reshape(spec.shape)

    def states(self, specs: Sequence[TensorSpec]) -> list[np.ndarray]:
        """NumPy arrays one after the other, in huge pages where the system has them."""
        return states_in_one_piece(specs)

    def staged(self, spec: TensorSpec) -> HostArray:
        return HostArray(self.zeros(spec))

    def row(self, array: np.ndarray, index: int) -> np.ndarray:
        return array[index : index + 1]

    def bind(self, bind: Any, name: str, array: np.ndarray) -> None:
        bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def run_options(self, _binding_index: int) -> ort.RunOptions | None:
        return None


@dataclasses.dataclass(frozen=True)
class HostArray:
    """A staged tensor whose host and device are one: nothing is copied."""

    host: np.ndarray

    @property
    def device(self) -> np.ndarray:
        return self.host

    def upload(self) -> None:
        """Nothing to do."""

    def download(self) -> None:
        """Nothing to do."""


class Graph:
    """One graph of the bundle, loaded.

    role: ``decode | prefill | verify``. threads, repack, library, weights: as of `open_graph`.

    Raises: BundleError, BackendError as `open_graph`; BundleError if its tensors are not those of the manifest.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        role: str,
        threads: int | None,
        device: Device,
        *,
        repack: bool,
        library: Path | None = None,
        weights: SharedWeights | None = None,
    ) -> None:
        graph = manifest.graphs[role]
        batch = graph.inputs[0].shape[0]
        self._role, self._states, self._graph, self._device = role, manifest.states, graph, device
        self._session = open_graph(
            bundle / graph.file,
            threads,
            device.providers,
            repack=repack,
            plan_memory=role != "prefill" or not isinstance(device, HostDevice),
            library=library,
            weights=weights,
        )
        shapes = {state.input: (batch, *state.shape[1:]) for state in manifest.states}
        state_inputs = [TensorSpec(s.input, shapes[s.input], s.dtype) for s in manifest.states]
        state_outputs = [TensorSpec(s.output, shapes[s.input], s.dtype) for s in manifest.states]
        _compare("input", self._session.get_inputs(), [*graph.inputs, *state_inputs])
        # A graph that verifies reads states alone.
        self._writes = role != VERIFY
        outputs = [*graph.outputs, *(state_outputs if self._writes else ())]
        _compare("output", self._session.get_outputs(), outputs)
        _compare_layout(graph.file, self._session, manifest)

    def bind(self, arrays: Mapping[str, Any], index: int) -> Binding:
        """Tie the graph to buffers: inputs and outputs by name, states by the names of their inputs.

        index: of this binding among the graph's.
        """
        binding, device = self._session.io_binding(), self._device
        for spec in self._graph.inputs:
            device.bind(binding.bind_input, spec.name, arrays[spec.name])
        for spec in self._graph.outputs:
            device.bind(binding.bind_output, spec.name, arrays[spec.name])
        for state in self._states:
            device.bind(binding.bind_input, state.input, arrays[state.input])
            if self._writes:
                device.bind(binding.bind_output, state.output, arrays[state.input])
        return Binding(self._role, self._session, binding, device.run_options(index), arrays)


@dataclasses.dataclass(frozen=True)
class Binding:
    """A graph with its buffers, ready to run any number of times."""

    role: str
    session: ort.InferenceSession
    binding: ort.IOBinding
    options: ort.RunOptions | None
    arrays: Mapping[str, Any]  # bound by address: they must live as long

    def run(self) -> None:
        """Run the graph once.

        Raises: BackendError.
        """
        try:
            self.session.run_with_iobinding(self.binding, self.options)
        except Exception as error:  # ONNX Runtime's errors have no common base but this
            raise BackendError(
                problem(
                    f"{self.role} run",
                    received=first_line(error),
                    expected="a run without error",
                    fix="reset or reload the session",
                )
            ) from error


def open_graph(
    path: Path,
    threads: int | None,
    providers: list[Any],
    *,
    repack: bool = True,
    plan_memory: bool = True,
    library: Path | None = None,
    weights: SharedWeights | None = None,
) -> ort.InferenceSession:
    """Load a graph.

    threads: of one operator; None leaves the choice to ONNX Runtime. providers: as of `Device`.
    repack: copy the weights to the layout that ONNX Runtime's matmuls like best. library: has operators of the graph.
    plan_memory: from the second run on take all intermediate results from one piece. That saves microseconds a run,
    but the first run's memory is kept beside it. weights: those that graphs share; None: the graph has its own.

    Raises: BundleError if ONNX Runtime refuses the graph; BackendError if it cannot load the first provider or use the
    library, or cannot start threads.
    """
    options = _session_options(threads, repack=repack, library=library)
    try:
        options.enable_mem_pattern = plan_memory
        if weights is not None:
            weights.give(path.name, options)
        session = ort.InferenceSession(path, options, providers=providers)
        session.kept_weights = weights  # it reads them for as long as it lives
    except Exception as error:
        raise BundleError(
            problem(
                path.name,
                received=f"a graph that ONNX Runtime refuses ({first_line(error)})",
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


def _session_options(threads: int | None, *, repack: bool, library: Path | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # nothing on stderr: errors are raised, and shown in one line by whoever catches
    # One graph, one stream of nodes: the threads serve single operators.
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Threads spin while a step runs and sleep between steps: the host has other work to do on its cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Graphs for TensorRT have Q/DQ nodes: they are computed as they stand. The INT8 matmuls that ONNX Runtime makes of
    # them round inputs that the graph does not round, and saturate at 16 bits on x86 without VNNI.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not repack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
        options.add_session_config_entry(THREADS_OPTION, str(threads))
    if library is not None:
        # The library's own threads spin; ONNX Runtime's, which have little to do, must not do so on the same cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        _register(library, options)
    return options


def _register(library: Path, options: ort.SessionOptions) -> None:
    """Give the operators of a library to a session that is made with `options`.

    Raises: BackendError.
    """
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:
        raise BackendError(
            problem(
                "CPU library",
                received=f"'{library}' ({first_line(error)})",
                expected="one that ONNX Runtime can use, and threads that start",
                fix="ask for fewer threads, or build the library of this version",
            )
        ) from error


def _compare(kind: str, found: list[ort.NodeArg], wanted: list[TensorSpec]) -> None:
    """Make sure that the graph has exactly the tensors that the manifest names.

    Raises: BundleError.
    """
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


def _compare_layout(file: str, session: ort.InferenceSession, manifest: Manifest) -> None:
    """Make sure that the graph was made for the sizes that the manifest says: not all of them show in its inputs.

    Raises: BundleError.
    """
    found, wanted = session.get_modelmeta().custom_metadata_map.get(LAYOUT_METADATA), graph_layout(manifest)
    if found != wanted:
        raise BundleError(
            problem(
                f"layout in {file}",
                received=found or "nothing",
                expected=wanted or "nothing",
                fix="graph and manifest differ: export again",
            )
        )


def first_line(error: BaseException) -> str:
    """First line of an error, at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
