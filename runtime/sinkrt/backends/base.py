"""What a session needs of a backend, and what every backend asks of a decode graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from sinkrt.contract import Manifest, TensorSpec
from sinkrt.errors import BundleError, problem


class Backend(Protocol):
    """A loaded decode graph with all of its buffers, allocated once.

    ids: int64 [B, 1] and position: int64 [B], written by the session before `run`.
    logits: float32 [B, vocab], overwritten by `run`.
    states: the state tensors by input name; `run` changes them in place.
    """

    @property
    def ids(self) -> np.ndarray: ...

    @property
    def position(self) -> np.ndarray: ...

    @property
    def logits(self) -> np.ndarray: ...

    @property
    def states(self) -> Mapping[str, np.ndarray]: ...

    def run(self) -> None:
        """Decode one token a stream.

        Raises: BackendError. The same position can be run again then: it overwrites what the failed run wrote.
        """
        ...


def check_decode_graph(manifest: Manifest) -> None:
    """The decode graph must be the one that `Backend` speaks of: these inputs and outputs and no others.

    Raises: BundleError.
    """
    graph, batch = manifest.graphs["decode"], manifest.stream.batch
    inputs = (TensorSpec("ids", (batch, 1), "int64"), TensorSpec("position", (batch,), "int64"))
    outputs = (TensorSpec("logits", (batch, manifest.model.vocab_size), "float32"),)
    for kind, found, wanted in (("inputs", graph.inputs, inputs), ("outputs", graph.outputs, outputs)):
        if sorted(found, key=lambda spec: spec.name) != list(wanted):
            raise BundleError(
                problem(f"{kind} of the decode graph", received=_shown(found), expected=_shown(wanted),
                        fix="export the model again")
            )  # fmt: skip
    names = [name for state in manifest.states for name in (state.input, state.output)]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BundleError(
            problem("states", received=f"'{twice}' twice", expected="names of their own", fix="export the model again")
        )


def _shown(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in specs) or "nothing"
