"""Interface between a session and its backend, and what every backend asks of the graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from sinkrt.contract import Manifest, TensorSpec
from sinkrt.contract.constants import VERIFY
from sinkrt.errors import BundleError, problem

if TYPE_CHECKING:  # names of backends are for help texts too, which need no NumPy
    import numpy as np


class StateArray(Protocol):
    """A state tensor: a NumPy array, or one in device memory whose rows are read and written by copies."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def itemsize(self) -> int: ...

    def __array__(self) -> np.ndarray: ...

    def __getitem__(self, key: Any, /) -> Any: ...

    def __setitem__(self, key: Any, value: Any, /) -> None: ...


class Verifier(Protocol):
    """A loaded graph that verifies drafts, with its buffers.

    ids: int64 [B, T], num_valid, position: int64 [B], written before `run`. A stream whose num_valid is 0 stands still.
    logits: float32 [B, T, vocab], after each token; those of tokens that do not count mean nothing.
    rows: new rows of the states by the name of the output (`sinkrt.contract.drafts`).
    """

    @property
    def ids(self) -> np.ndarray: ...

    @property
    def num_valid(self) -> np.ndarray: ...

    @property
    def position(self) -> np.ndarray: ...

    @property
    def logits(self) -> np.ndarray: ...

    @property
    def rows(self) -> Mapping[str, np.ndarray]: ...

    def run(self) -> None:
        """Compute logits and rows. The states stay as they are, so a run can be repeated.

        Raises: BackendError.
        """
        ...


class Backend(Protocol):
    """The loaded graphs of a bundle with all of their buffers, allocated once.

    ids: int64 [B, 1] and position: int64 [B], written by the session before `run`.
    logits: float32 [B, vocab], overwritten by `run`, and a row of it by `run_chunk`.
    states: the state tensors by input name; `run` changes them in place.
    not_recorded: why runs are not replayed as CUDA graphs; None: they are, or there is no GPU.

    Twin of runtime/cpp/include/sinkrt/backend.h.
    """

    @property
    def ids(self) -> np.ndarray: ...

    @property
    def position(self) -> np.ndarray: ...

    @property
    def logits(self) -> np.ndarray: ...

    @property
    def states(self) -> Mapping[str, StateArray]: ...

    @property
    def not_recorded(self) -> str | None: ...

    def run(self) -> None:
        """Decode one token a stream; in graphs with recurrent states, none where the id is ``NO_TOKEN``.

        Raises: BackendError. Without recurrent states the same position can be run again: that overwrites what the
        failed run wrote.
        """
        ...

    def load_verifier(self) -> Verifier | None:
        """Open the graph that verifies drafts, with its buffers; later calls give the same. None: it has no place here.

        Raises: BundleError, BackendError as loading does.
        """
        ...

    def run_chunk(self, stream: int, ids: np.ndarray, position: int) -> None:
        """Feed ids, int64 [n], 1 <= n <= chunk_size, to one stream, the first of them at `position`; writes its logits.

        Raises: BackendError. The stream is lost then: a chunk overwrites what it would have to read again.
        """
        ...


def check_graphs(manifest: Manifest) -> None:
    """Make sure that the graphs have the inputs and outputs that `Backend` needs, and no others.

    decode: one token of each of the B streams. prefill: 1 .. T tokens of one stream, so that a long prompt costs the
    other streams nothing; it exists if T > 1. With the TensorRT plugin numbers are int32, and a position t is t >> 16
    and t & 0xffff.

    Raises: BundleError.
    """
    stream, vocab_size = manifest.stream, manifest.model.vocab_size
    roles = {"decode": (stream.batch, 1), "prefill": (1, stream.chunk_size)}
    if stream.chunk_size == 1:
        del roles["prefill"]
    # The manifest has checked the verify graph.
    if sorted(set(manifest.graphs) - {VERIFY}) != sorted(roles):
        raise BundleError(
            problem(
                "graphs",
                received=", ".join(sorted(manifest.graphs)),
                expected=", ".join(roles),
                fix="export the model again",
            )
        )
    has_plugin = manifest.has_tensorrt_plugin
    dtype = "int32" if has_plugin else "int64"
    for role, (batch, num_tokens) in roles.items():
        graph = manifest.graphs[role]
        position = (batch, 2) if has_plugin else (batch,)
        inputs = [TensorSpec("ids", (batch, num_tokens), dtype), TensorSpec("position", position, dtype)]
        if role == "prefill":
            inputs.insert(1, TensorSpec("num_valid", (batch,), dtype))
        outputs = [TensorSpec("logits", (batch, vocab_size), "float32")]
        for kind, found, wanted in (("inputs", graph.inputs, inputs), ("outputs", graph.outputs, outputs)):
            if sorted(found, key=lambda spec: spec.name) != wanted:
                raise BundleError(
                    problem(
                        f"{kind} of the {role} graph",
                        received=_shown(found),
                        expected=_shown(wanted),
                        fix="export the model again",
                    )
                )
    names = [name for state in manifest.states for name in (state.input, state.output)]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BundleError(
            problem("states", received=f"'{twice}' twice", expected="names of their own", fix="export the model again")
        )


def _shown(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in specs) or "nothing"
