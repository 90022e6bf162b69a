"""TensorRT (8.5, 8.6, 10, 11) or TensorRT-RTX over the engines that 'sinkexport build' put into a bundle.

Steps and chunks are recorded as CUDA graphs where the version can. States of attention are bound in place, input and
output to one buffer; recurrent ones, which a step makes anew by standard operators, are copied back: TensorRT promises
an order within an engine only where an operator is made for it. The engine decides which package is wanted:
``tensorrt`` or ``tensorrt_rtx``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sinkrt.backends.base import StateArray
from sinkrt.backends.cuda import ALIGNMENT_BYTES, Cuda, DeviceArray, Staged
from sinkrt.backends.tensorrt_library import create, load_plugin, make_logger, one_line, said
from sinkrt.contract import RECURRENT_KINDS, EngineFacts, Manifest, TensorSpec
from sinkrt.contract.constants import TENSORRT, TENSORRT_RTX
from sinkrt.engines import PLUGIN_FILE, EngineHost, check_engine
from sinkrt.errors import BackendError, problem

PACKAGES: Mapping[str, tuple[str, ...]] = {
    TENSORRT: ("tensorrt",),
    TENSORRT_RTX: ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}


class TensorrtBackend:
    """Implements `Backend` on the first GPU.

    Raises: BackendError if the package, the GPU or the engines are missing or do not fit together.
    """

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        facts = _decode_facts(manifest)
        trt = import_package(facts.flavour)
        self.not_recorded: str | None = None
        self._cuda = Cuda()
        self._logger = make_logger(trt)  # TensorRT keeps a raw pointer to it
        self._runtime = create(trt.Runtime, self._logger)
        abi = None
        if manifest.has_tensorrt_plugin:
            abi = load_plugin(trt, trt.get_plugin_registry(), bundle / PLUGIN_FILE, "plugin")
        host = EngineHost(facts.flavour, str(trt.__version__), abi, self._cuda.compute_capability)
        self._engines = {
            role: Engine(self._runtime, self._logger, role, check_engine(bundle, manifest, role, host))
            for role in manifest.graphs
        }
        self._has_plugin = manifest.has_tensorrt_plugin
        self._states = {s.input: self._cuda.zeros(TensorSpec(s.input, s.shape, s.dtype)) for s in manifest.states}
        self._outputs = {state.input: state.output for state in manifest.states}
        batch, vocab_size = manifest.stream.batch, manifest.model.vocab_size
        self._ids, self._position = np.zeros((batch, 1), np.int64), np.zeros(batch, np.int64)
        self._logits = Staged(self._cuda, TensorSpec("logits", (batch, vocab_size), "float32"))
        self._inputs = {role: self._staged(manifest, role) for role in manifest.graphs}
        self._step = self._bind_step(manifest)
        self._chunks = [self._bind_chunk(stream) for stream in range(batch)] if "prefill" in manifest.graphs else []
        self._cuda.synchronize()
        for state in self._states.values():
            state[...] = 0

    @property
    def ids(self) -> np.ndarray:
        return self._ids

    @property
    def position(self) -> np.ndarray:
        return self._position

    @property
    def logits(self) -> np.ndarray:
        return self._logits.host

    @property
    def states(self) -> Mapping[str, StateArray]:
        return self._states

    def run(self) -> None:
        inputs = self._inputs["decode"]
        inputs["ids"].host[...] = self._ids
        inputs["position"].host[...] = self._laid_out(self._position)
        self._go(inputs, self._step)

    def load_verifier(self) -> None:
        """No graph verifies drafts here."""

    def run_chunk(self, stream: int, ids: np.ndarray, position: int) -> None:
        inputs = self._inputs["prefill"]
        inputs["ids"].host[0, : ids.size] = ids
        inputs["ids"].host[0, ids.size :] = 0  # any token: what is not valid is computed and dropped
        inputs["position"].host[...] = self._laid_out(np.array([position]))
        inputs["num_valid"].host[...] = ids.size
        # The host's logits are what counts: a loaded state, and rows that a step of others has left alone, are there.
        self._logits.upload()
        self._go(inputs, self._chunks[stream])

    def _go(self, inputs: Mapping[str, Staged], work: Callable[[], None]) -> None:
        for each in inputs.values():
            each.upload()
        work()
        self._cuda.synchronize()
        self._logits.download()

    def _laid_out(self, position: np.ndarray) -> np.ndarray:
        """Positions, int64 [B], as the graphs take them: [B], or [B, 2] with the plugin."""
        return np.stack([position >> 16, position & 0xFFFF], axis=1) if self._has_plugin else position

    def _staged(self, manifest: Manifest, role: str) -> dict[str, Staged]:
        return {spec.name: Staged(self._cuda, spec) for spec in manifest.graphs[role].inputs}

    def _devices(self, role: str) -> dict[str, DeviceArray]:
        return {name: each.device for name, each in self._inputs[role].items()}

    def _bound(self, states: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]:
        """States by the names of their inputs and, the same buffers, of their outputs."""
        return {**states, **{self._outputs[name]: array for name, array in states.items()}}

    def _bind_step(self, manifest: Manifest) -> Callable[[], None]:
        """Prepare the run of the decode engine: states that it makes anew are copied back behind it."""
        cuda, states, decode = self._cuda, self._states, self._engines["decode"]
        after = {
            s.input: cuda.zeros(TensorSpec(s.output, s.shape, s.dtype))
            for s in manifest.states
            if s.kind in RECURRENT_KINDS
        }
        decode.bind(
            {
                **self._devices("decode"),
                "logits": self._logits.device,
                **self._bound(states),
                **{self._outputs[name]: array for name, array in after.items()},
            }
        )

        def step() -> None:  # refers not to self, which refers to it: GPU memory is freed as soon as a session closes
            decode.execute(cuda)
            for name, array in after.items():
                cuda.on_device(states[name].address, array.address, array.nbytes)

        step()  # what a first run does cannot be recorded
        return self._recorded(step)

    def _bind_chunk(self, stream: int) -> Callable[[], None]:
        """Prepare a run of the prefill engine on one stream's rows.

        A row that does not lie where TensorRT wants addresses is copied to where it does, and back.
        """
        engine, cuda = self._engines["prefill"], self._cuda
        rows = {"logits": self._logits.device.row(stream), **{n: s.row(stream) for n, s in self._states.items()}}
        copies = {
            name: cuda.zeros(TensorSpec(name, row.shape, str(row.dtype)))
            for name, row in rows.items()
            if row.address % ALIGNMENT_BYTES
        }
        seen = {**rows, **copies}
        bound = {**self._devices("prefill"), "logits": seen.pop("logits"), **self._bound(seen)}

        def work() -> None:
            for name, copy in copies.items():
                cuda.on_device(copy.address, rows[name].address, copy.nbytes)
            engine.bind(bound)
            engine.execute(cuda)
            for name, copy in copies.items():
                cuda.on_device(rows[name].address, copy.address, copy.nbytes)

        self._inputs["prefill"]["num_valid"].host[...] = 1
        self._inputs["prefill"]["num_valid"].upload()
        work()
        return self._recorded(work)

    def _recorded(self, work: Callable[[], None]) -> Callable[[], None]:
        """The work as a CUDA graph, or as it is where it cannot be recorded."""
        graph = self._cuda.record(work)
        if graph is None:
            self.not_recorded = "a part of the engines' runs cannot be recorded"
        return graph or work


class Engine:
    """One graph's engine with an execution context."""

    def __init__(self, runtime: Any, logger: Any, role: str, path: Path) -> None:
        self._logger, self._role = logger, role
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        context = None if engine is None else engine.create_execution_context()
        if context is None:
            raise BackendError(
                problem(
                    f"{role} engine",
                    received=said(logger),
                    expected="an engine that runs here, and room for it on the GPU",
                    fix="free GPU memory, or run 'sinkexport build' on this machine",
                )
            )
        self._engine, self._context = engine, context
        self._names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}

    def bind(self, arrays: Mapping[str, DeviceArray]) -> None:
        """Tie all inputs and outputs to buffers.

        Raises: BackendError if the engine has others, or TensorRT does not take an address.
        """
        if different := sorted(self._names ^ set(arrays)):
            raise BackendError(
                problem(
                    f"{self._role} engine",
                    received=f"'{different[0]}'",
                    expected="the tensors that the manifest names",
                    fix="run 'sinkexport build' again",
                )
            )
        for name, array in arrays.items():
            if not self._context.set_tensor_address(name, array.address):
                raise BackendError(
                    problem(
                        f"{self._role} engine: '{name}'",
                        received=said(self._logger),
                        expected="an address that TensorRT takes",
                        fix="run 'sinkexport build' again",
                    )
                )

    def execute(self, cuda: Cuda) -> None:
        """Put a run on the stream.

        Raises: BackendError.
        """
        if not self._context.execute_async_v3(cuda.stream):
            raise BackendError(
                problem(
                    f"{self._role} run",
                    received=said(self._logger),
                    expected="a run without error",
                    fix="load the session again",
                )
            )


def _decode_facts(manifest: Manifest) -> EngineFacts:
    """Facts of the decode engine.

    Raises: BackendError if there is none.
    """
    facts = (manifest.engines or {}).get("decode")
    if facts is None:
        first = "" if manifest.target == "tensorrt" else "export with --target tensorrt, then "
        raise BackendError(
            problem(
                "backend 'tensorrt'",
                received="a bundle without a decode engine",
                expected="one with engines",
                fix=f"{first}run 'sinkexport build' on this machine",
            )
        )
    return facts


def import_package(flavour: str) -> Any:
    """Import the Python package that runs engines of this flavour.

    Raises: BackendError.
    """
    failures = []
    for package in PACKAGES[flavour]:
        try:
            return importlib.import_module(package)
        except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
            failures.append(one_line(f"{type(error).__name__}: {error}"))
    fix = "pip install 'sinkexport[tensorrt]'" if flavour == TENSORRT_RTX else "install NVIDIA's 'tensorrt'"
    raise BackendError(
        problem(
            flavour,
            received="; ".join(failures),
            fix=fix,
            expected=" or ".join(f"'{package}'" for package in PACKAGES[flavour]),
        )
    )
