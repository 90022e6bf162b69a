"""ONNX Runtime, with every input and output bound to a buffer that is allocated once.

Twin of runtime/cpp/src/backends/ort.cpp.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sinkrt.backends.base import StateArray, Verifier
from sinkrt.backends.cpu_library import checked_library
from sinkrt.backends.ort_graph import Binding, Device, Graph, HostDevice
from sinkrt.backends.state_memory import states_in_one_piece
from sinkrt.backends.weights import SharedWeights
from sinkrt.contract import GraphSpec, Manifest, TensorSpec
from sinkrt.contract.constants import CPU, VERIFY
from sinkrt.errors import BackendError, problem


class OrtBackend:
    """Implements `Backend`. Each state's input and output are one buffer, so TensorScatter writes its slots in place.

    threads: of one operator; None leaves the choice to ONNX Runtime (all physical cores).
    repack_prefill: a second copy of the weights, in the layout that matmuls like best, makes prefill about a seventh
    faster (measured on a CPU with AVX-512). Without it the prefill graph reads the pages of the weights file, which are
    mapped and shared. None: if the copy takes no more than a quarter of the memory that is free.
    repack_decode: the same of the decode graph.
    device: None: the CPU. not_recorded: what `Backend` reports by that name.
    step, chunks: the decode graph's binding, and the prefill graph's by stream; for inspection.

    Raises: BundleError if a graph is unreadable or is not what the manifest says; BackendError if ONNX Runtime
    cannot run it, or the states do not fit into the memory that is free.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        threads: int | None,
        repack_prefill: bool | None = None,
        device: Device | None = None,
        not_recorded: str | None = None,
        *,
        repack_decode: bool = True,
    ) -> None:
        self.not_recorded = not_recorded
        if repack_prefill is None:
            repack_prefill = manifest.weights_bytes <= available_bytes() // 4
        if device is None:
            _check_memory(manifest)
            device = HostDevice()
        # Opened first: a manifest whose sizes are not the graphs' is refused before memory is asked for.
        library = checked_library(manifest.plugin_abi) if manifest.target == CPU else None
        # Only weights that the library's operators read can be shared.
        weights = SharedWeights(bundle, manifest) if library else None
        open_ = functools.partial(
            Graph, bundle, manifest, threads=threads, device=device, library=library, weights=weights
        )
        self._manifest, self._device = manifest, device
        self._verifier: OrtVerifier | None = None
        self._open_verifier = functools.partial(open_, VERIFY, repack=repack_prefill)
        decode, prefill = open_("decode", repack=repack_decode), manifest.graphs.get("prefill")
        in_chunks = open_("prefill", repack=repack_prefill) if prefill else None
        specs = [TensorSpec(state.input, state.shape, state.dtype) for state in manifest.states]
        self._states = {spec.name: state for spec, state in zip(specs, device.states(specs), strict=True)}
        graph = manifest.graphs["decode"]
        self._arrays = {spec.name: device.staged(spec) for spec in (*graph.inputs, *graph.outputs)}
        self.step = decode.bind({**_devices(self._arrays), **self._states}, 0)
        self.chunks: list[Binding] = []
        if prefill is not None and in_chunks is not None:
            self._chunk_inputs = {spec.name: device.staged(spec) for spec in prefill.inputs}
            for stream in range(manifest.stream.batch):
                # The prefill graph sees one stream: a row of each.
                rows = {"logits": self._arrays["logits"].device, **self._states}
                views = {name: device.row(array, stream) for name, array in rows.items()}
                self.chunks.append(in_chunks.bind({**_devices(self._chunk_inputs), **views}, stream))
        # ONNX Runtime allocates intermediate results in the first run: have that behind us when the stream starts.
        self.run()
        for stream in range(len(self.chunks)):
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
        self.step.run()
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
        self.chunks[stream].run()
        self._arrays["logits"].download()

    def load_verifier(self) -> Verifier | None:
        if self._verifier is None and isinstance(self._device, HostDevice) and VERIFY in self._manifest.graphs:
            self._verifier = OrtVerifier(self._open_verifier(), self._manifest.graphs[VERIFY], self._states)
        return self._verifier

    def _host(self, name: str) -> np.ndarray:
        array: np.ndarray = self._arrays[name].host
        return array


class OrtVerifier:
    """Implements `Verifier` on the CPU. graph: of `spec`. states: by input name, read where they are."""

    def __init__(self, graph: Graph, spec: GraphSpec, states: Mapping[str, Any]) -> None:
        specs = [*spec.inputs, *spec.outputs]
        arrays = dict(zip((one.name for one in specs), states_in_one_piece(specs), strict=True))
        self.ids, self.num_valid, self.position = (arrays.pop(name) for name in ("ids", "num_valid", "position"))
        self.logits = arrays.pop("logits")
        self.rows: Mapping[str, np.ndarray] = arrays
        inputs = {"ids": self.ids, "num_valid": self.num_valid, "position": self.position}
        self._binding = graph.bind({**inputs, "logits": self.logits, **arrays, **states}, 0)
        self.num_valid.fill(1)
        self.run()  # intermediate results are allocated in the first run

    def run(self) -> None:
        self._binding.run()


def _check_memory(manifest: Manifest) -> None:
    """Make sure that the states fit: systems that hand out more memory than they have kill the process instead.

    Raises: BackendError.
    """
    if 0 < (available := available_bytes()) < manifest.state_bytes:
        raise BackendError(
            problem(
                "memory",
                received=f"{available} bytes",
                expected=f"{manifest.state_bytes} bytes for the cache",
                fix="export with a smaller --window or --batch",
            )
        )


def _devices(staged: Mapping[str, Any]) -> dict[str, Any]:
    return {name: each.device for name, each in staged.items()}


def available_bytes() -> int:
    """Memory that is free or can be freed at once; 0 where the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").split("\n")
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0
