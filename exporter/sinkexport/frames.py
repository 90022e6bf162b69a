"""Export a model that makes frames, or blocks of frames, one after the other forever: video and audio.

The model is a module of the caller's, since there is no common interface of such models as there is of language models:
its ``forward(position, oldest, states, **inputs) -> (output, next states)`` makes one block and calls
`FrameCache.attend` in each attention over time. `export_frames` traces it and writes a folder that `sinkrt.frames`
runs, every state in one buffer for its input and its output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from sinkrt.errors import UsageError, problem
from sinkrt.frames import GRAPH_FILE, SPEC_FILE, FrameSpec, FrameState
from sinkrt.ring import phase_frequency

from sinkexport.graph.convert import convert, finish, tensor_spec
from sinkexport.graph.graph_pass import PassContext, run_passes
from sinkexport.model.attention import rotated, stream_angles
from sinkexport.model.block_attention import block_attention
from sinkexport.pipeline.bundle_writer import staged_bundle, write_graph
from sinkexport.targets import ONNX

PASSES = ("fold_constants", "make_reshapes_static", "expand_attention", "make_reshapes_static")
"""Graph passes: those of the target ``onnx`` that a model of the caller's needs."""


@dataclasses.dataclass(frozen=True)
class FrameGeometry:
    """num_sink_blocks: S >= 0, first blocks kept forever. window_blocks: W >= 1, last blocks kept, the one at hand
    included. block_tokens: T >= 1, tokens of a block. batch: B streams in step.

    Raises: UsageError.
    """

    num_sink_blocks: int
    window_blocks: int
    block_tokens: int
    batch: int = 1

    def __post_init__(self) -> None:
        for name, low in (("num_sink_blocks", 0), ("window_blocks", 1), ("block_tokens", 1), ("batch", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise UsageError(problem(name, received=repr(value), expected=f"an integer >= {low}", fix="change it"))

    def empty_states(self, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Layer by layer sink_k, sink_v [B, Hkv, S * T, D] (none if S = 0), window_k, window_v [B, Hkv, W * T, D]."""
        lengths = [self.num_sink_blocks] * 2 * (self.num_sink_blocks > 0) + [self.window_blocks] * 2
        return [
            torch.zeros(self.batch, num_kv_heads, blocks * self.block_tokens, head_dim, dtype=dtype)
            for _ in range(num_layers)
            for blocks in lengths
        ]


class FrameCache:
    """State that the attentions over time of one forward pass share. Make one at the start of ``forward``.

    inv_freq: [R/2], radians a block, of the rotation over time; empty: none. interleaved: pairs are neighbours
    (2i, 2i+1); otherwise (i, i + R/2). The leading R dimensions of a head turn.
    """

    def __init__(
        self,
        geometry: FrameGeometry,
        position: torch.Tensor,
        oldest: torch.Tensor,
        states: Sequence[torch.Tensor],
        inv_freq: Sequence[float] = (),
        *,
        interleaved: bool = False,
    ) -> None:
        self._geometry, self._position, self._oldest, self._interleaved = geometry, position, oldest, interleaved
        self._states = list(states)
        self._next: list[torch.Tensor] = []
        self._turn: tuple[torch.Tensor, torch.Tensor] | None = None
        if len(inv_freq):
            frequency = torch.tensor([phase_frequency(float(f)) for f in inv_freq])
            behind = geometry.num_sink_blocks + geometry.window_blocks - 1
            # Of the block, so of one "token": [B, 1, R/2], spread over the block's tokens where they are used.
            self._turn = stream_angles(position, frequency, 1, 0)
            self._shift = stream_angles(position, frequency, 1, behind)

    @property
    def next_states(self) -> list[torch.Tensor]:
        """States that ``forward`` returns, in the order of ``states``."""
        return self._next

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        """The next layer's: q [B, Hq, T, D], k and v [B, Hkv, T, D], not rotated over time -> [B, Hq, T, D]."""
        count = 4 if self._geometry.num_sink_blocks else 2
        start = len(self._next)
        own = self._states[start : start + count]
        shift: tuple[torch.Tensor, ...] | tuple[None, None] = (None, None)
        if self._turn is not None:
            q, k = (self._rotated(x) for x in (q, k))
            if count == 4:
                shift = tuple(angles.to(q.dtype).expand(-1, q.shape[2], -1) for angles in self._shift)
        out, *updated = block_attention(
            q,
            k,
            v,
            *(own[:2] if count == 4 else (None, None)),
            *own[-2:],
            self._position,
            *shift,
            self._oldest,
            float(q.shape[-1] ** -0.5 if scale is None else scale),
            self._interleaved,
        )
        self._next += updated[-count:]
        return out

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        if self._turn is None:
            return x
        cos, sin = (angles.to(x.dtype).expand(-1, x.shape[2], -1) for angles in self._turn)
        return rotated(x, cos, sin, interleaved=self._interleaved)


def export_frames(
    model: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    states: Sequence[torch.Tensor],
    geometry: FrameGeometry,
    out: Path | str,
    *,
    overwrite: bool = False,
) -> FrameSpec:
    """Trace one block of `model`, which is in evaluation mode, and write it to the folder `out`.

    inputs: examples of what ``forward`` takes by name besides position, oldest and states; their shapes are fixed.
    states: from `FrameGeometry.empty_states`.

    Raises: UsageError if the model returns other states than it takes, or has an operation that ONNX cannot express, or
    `out` cannot be written.
    """
    zeros = torch.zeros(geometry.batch, dtype=torch.int64)
    with torch.no_grad():
        program = torch.export.export(model, (zeros, zeros.clone(), list(states)), dict(inputs), strict=False)
    graph_model = convert(program)
    run_passes(graph_model, PASSES, PassContext(ONNX))
    graph = graph_model.graph
    position, oldest, *rest = graph.inputs
    befores, others = rest[: len(states)], rest[len(states) :]
    output, *afters = graph.outputs
    if len(afters) != len(befores) or any(a.shape != b.shape for a, b in zip(afters, befores, strict=True)):
        raise UsageError(
            problem(
                "forward",
                received=f"{len(afters)} states returned",
                expected=f"the {len(befores)} that it takes, of the same shapes",
                fix="return the cache's next_states",
            )
        )
    position.name, oldest.name, output.name = "position", "oldest", "output"
    for value, name in zip(others, inputs, strict=True):
        value.name = name
    for i, (before, after) in enumerate(zip(befores, afters, strict=True)):
        before.name, after.name = f"state.{i}", f"state.{i}.next"
    finish(graph_model, "frames", ONNX)
    spec = FrameSpec(
        **dataclasses.asdict(geometry),
        inputs=tuple(tensor_spec(value) for value in others),
        output=tensor_spec(output),
        states=tuple(
            FrameState(input=tensor_spec(before), output=str(after.name))
            for before, after in zip(befores, afters, strict=True)
        ),
    )
    with staged_bundle(Path(out), overwrite=overwrite) as stage:
        write_graph(graph_model, stage, GRAPH_FILE, _ignored)
        onnx.checker.check_model(stage / GRAPH_FILE)
        (stage / SPEC_FILE).write_text(spec.to_json(), encoding="utf-8")
    return spec


def _ignored(_done: int, _total: int) -> Any:
    return None
