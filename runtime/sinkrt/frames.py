"""Run a model that makes block after block of frames, with frame sinks and a window, in constant memory.

    session = FrameSession.load("folder")
    while True:
        for step in schedule:  # denoise the block at hand; its keys are written again each time
            x = update(x, session.run({"x": x, "time": step, "prompt": prompt}))
        session.commit({"x": x, "time": 0.0, "prompt": prompt})  # its keys as they stay; on to the next block
        if a new prompt comes:
            session.recache(lambda block: {"x": latents[block], "time": 0.0, "prompt": new_prompt})

The folder is one of `sinkexport.frames.export_frames`. Frame sinks and recaching are LongLive's (arXiv:2509.22622).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from sinkrt.backends.ort_graph import HostDevice, open_graph
from sinkrt.contract import TensorSpec, build_from_json
from sinkrt.errors import BackendError, BundleError, UsageError, problem
from sinkrt.ring import POSITION_LIMIT, Ring

GRAPH_FILE, SPEC_FILE = "frames.onnx", "frames.json"
Inputs = Mapping[str, Any]
"""Arrays by the names of the model's inputs."""


@dataclasses.dataclass(frozen=True)
class FrameState:
    """A state: its input, and the name of its output, which must be bound to the same buffer."""

    input: TensorSpec
    output: str


@dataclasses.dataclass(frozen=True)
class FrameSpec:
    """Content of `frames.json`: S, W (blocks), T (tokens of a block), B, and the graph's tensors.

    position and oldest, int64 [B], are not among them.
    """

    num_sink_blocks: int
    window_blocks: int
    block_tokens: int
    batch: int
    inputs: tuple[TensorSpec, ...]
    output: TensorSpec
    states: tuple[FrameState, ...]

    def to_json(self) -> str:
        """Write as JSON, the same text for the same spec."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


class FrameSession:
    """B streams in step. All buffers are allocated when it is made; their addresses never change."""

    def __init__(self, folder: Path, spec: FrameSpec, threads: int | None = None) -> None:
        self.spec = spec
        self._ring = Ring(spec.num_sink_blocks, spec.window_blocks)  # in blocks
        self._position = 0
        words = [TensorSpec(name, (spec.batch,), "int64") for name in ("position", "oldest")]
        tensors = [*words, *spec.inputs, spec.output, *(state.input for state in spec.states)]
        device = HostDevice()
        self.buffers: dict[str, np.ndarray] = {tensor.name: device.zeros(tensor) for tensor in tensors}
        self._session = open_graph(folder / GRAPH_FILE, threads, device.providers)
        self._binding = self._session.io_binding()
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self.buffers.items()}
        for tensor in [*words, *spec.inputs]:
            self._binding.bind_ortvalue_input(tensor.name, values[tensor.name])
        self._binding.bind_ortvalue_output(spec.output.name, values[spec.output.name])
        for state in spec.states:
            self._binding.bind_ortvalue_input(state.input.name, values[state.input.name])
            self._binding.bind_ortvalue_output(state.output, values[state.input.name])

    @classmethod
    def load(cls, folder: Path | str, *, threads: int | None = None) -> FrameSession:
        """Open a folder of `export_frames`.

        Raises: BundleError.
        """
        path = Path(folder) / SPEC_FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BundleError(
                problem(
                    SPEC_FILE,
                    received=f"no readable file at '{path}' ({error})",
                    expected="a folder that export_frames wrote",
                    fix="check the path",
                )
            ) from None
        return cls(Path(folder), build_from_json(FrameSpec, raw, SPEC_FILE), threads)

    @property
    def position(self) -> int:
        """Blocks that are done: the index of the one at hand. Set it to go on elsewhere with the same cache."""
        return self._position

    @position.setter
    def position(self, block: int) -> None:
        self._position = block

    @property
    def cached_blocks(self) -> tuple[int, ...]:
        """The finished blocks that are in the cache, oldest first: sinks, then window."""
        return self._ring.cached_tokens(self._position - 1) if self._position else ()

    def run(self, inputs: Inputs) -> np.ndarray:
        """Compute the block at hand; the array is reused by the next call.

        It can be run again, with other inputs: the cache then holds it as it was run last. The block that it evicts is
        gone from the first run on.

        Raises: UsageError for inputs of other names, shapes or types; BackendError.
        """
        return self._run(inputs, self._position, oldest=0)

    def commit(self, inputs: Inputs) -> np.ndarray:
        """Compute the block at hand as `run` does, and go on to the next one."""
        output = self.run(inputs)
        self._position += 1
        return output

    def recache(self, inputs_of: Callable[[int], Inputs], *, sinks: bool = False) -> None:
        """Compute the keys and values of all cached blocks anew, as under a new prompt, in the buffers where they are.

        inputs_of: what to run a finished block with, by its index; the caller keeps the last W blocks (and the first
        S). sinks: those too; otherwise they stay as they are. Each block sees sinks and the blocks that were rebuilt
        before it, at the distances that it had.

        Raises: as `run`. The window is then half rebuilt: call it again.
        """
        first_of_window = min((b for b in self.cached_blocks if not self._ring.is_sink(b)), default=self._position)
        for block in self.cached_blocks:
            if sinks or not self._ring.is_sink(block):
                self._run(inputs_of(block), block, oldest=first_of_window)

    def reset(self) -> None:
        """Forget all blocks."""
        self._position = 0
        for state in self.spec.states:
            self.buffers[state.input.name].fill(0)

    def _run(self, inputs: Inputs, position: int, oldest: int) -> np.ndarray:
        if position >= POSITION_LIMIT:
            raise UsageError(problem("position", received=position, expected=f"below {POSITION_LIMIT}", fix="reset"))
        given = {name: np.asarray(value) for name, value in inputs.items()}
        for tensor in self.spec.inputs:
            array = given.pop(tensor.name, None)
            found = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
            if array is None or array.shape != tensor.shape or array.dtype.kind != np.dtype(tensor.dtype).kind:
                raise UsageError(
                    problem(
                        f"input '{tensor.name}'",
                        received=found,
                        expected=f"{tensor.dtype} {list(tensor.shape)}",
                        fix="pass what the model was exported for",
                    )
                )
            self.buffers[tensor.name][...] = array
        if given:
            raise UsageError(
                problem(
                    f"input '{next(iter(given))}'",
                    received="an array",
                    fix="leave it out",
                    expected=", ".join(tensor.name for tensor in self.spec.inputs),
                )
            )
        self.buffers["position"].fill(position)
        self.buffers["oldest"].fill(oldest)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime's errors have no common base but this
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BackendError(
                problem("block", received=reason, expected="a run without error", fix="run it again, or reset")
            ) from error
        return self.buffers[self.spec.output.name]
