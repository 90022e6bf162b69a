"""Text streamed through sinks and window, with observers that see what every linear layer is fed.

Tokens past the window are what a bundle mostly decodes, so that is what is observed: pieces of text run through
`chunked_streaming`, whose attention sees what the ring holds, far beyond S + W if a piece is long enough.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from sinkrt.errors import UsageError, problem

from sinkexport.reference.chunked import ChunkedStream, chunked_streaming
from sinkexport.util.progress import Report, silent

CHUNK_TOKENS = 256
"""Tokens that the model takes at once: enough to keep the matmuls busy."""


class Observer(Protocol):
    """Sees inputs of linear layers. Layers that are fed the very same tensor are one: see `input_groups`."""

    def update(self, module: str, inputs: torch.Tensor, is_sink: torch.Tensor) -> None:
        """module: the first of its group, such as ``model.layers.0.self_attn.q_proj``.

        inputs: [n, K] in the model's dtype, all finite, of n tokens in a row; must be neither changed nor kept.
        is_sink: bool [n], tokens 0 .. S-1 of their stream.
        """


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """The ring: S = num_sink_tokens >= 0, W = window_size >= 1. chunk_tokens: that the model takes at once, >= 1."""

    num_sink_tokens: int
    window_size: int
    chunk_tokens: int = CHUNK_TOKENS


def stream_inputs(
    model: Any,
    pieces: npt.NDArray[np.int64],
    config: StreamConfig,
    observers: Sequence[Observer],
    report: Report = silent,
    *,
    groups: Mapping[str, tuple[str, ...]] | None = None,
    first_piece: int = 0,
    after_piece: Callable[[int], None] | None = None,
) -> None:
    """Stream each piece of text from position 0 of an empty cache; observers see every token's inputs once.

    model: of transformers, in evaluation mode; left as it was. pieces: ids [N, L], L >= 1.
    groups: whose inputs are observed, as `input_groups` gives them; None: all. first_piece: where to go on.
    after_piece: called after each piece with the number that is done. report: gets the stage ``stream``, in tokens.

    Raises: UsageError for a bad geometry, a model that cannot be streamed exactly, and for inputs that are NaN or
    infinite, which names the layer.
    """
    num_pieces, length = pieces.shape
    groups = input_groups(model) if groups is None else groups
    report("stream", first_piece * length, num_pieces * length)
    with (
        chunked_streaming(model, config.num_sink_tokens, config.window_size) as stream,
        _observed(model, config, stream, observers, groups),
    ):
        for piece in range(first_piece, num_pieces):
            stream.reset()
            for start in range(0, length, config.chunk_tokens):
                chunk = torch.from_numpy(pieces[piece, start : start + config.chunk_tokens])
                stream.feed(chunk[None])
                report("stream", piece * length + start + len(chunk), num_pieces * length)
            if after_piece is not None:
                after_piece(piece + 1)


def input_groups(model: Any) -> dict[str, tuple[str, ...]]:
    """The linear layers of a model by what they read: first of a group -> all that are fed the very same tensor.

    In the order in which the model calls them; queries, keys and values of a layer are a group. A layer that a token
    does not reach is left out. One token is run to find out.
    """
    seen: list[tuple[torch.Tensor, list[str]]] = []  # holds on to the tensors, or an address could come twice

    def note(name: str, inputs: torch.Tensor) -> None:
        members = next((members for known, members in seen if known is inputs), None)
        if members is None:
            seen.append((inputs, [name]))
        elif name not in members:
            members.append(name)

    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    with _hooked(model, linear, note), torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
    return {members[0]: tuple(members) for _, members in seen}


@contextlib.contextmanager
def _observed(
    model: Any,
    config: StreamConfig,
    stream: ChunkedStream,
    observers: Sequence[Observer],
    groups: Mapping[str, tuple[str, ...]],
) -> Iterator[None]:
    def observe(name: str, inputs: torch.Tensor) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1])  # [n, K]: one stream
        first = stream.position
        _refuse_not_finite(name, rows, first)
        is_sink = torch.arange(first, first + len(rows)) < config.num_sink_tokens
        for observer in observers:
            observer.update(name, rows, is_sink)

    with _hooked(model, groups, observe):
        yield


@contextlib.contextmanager
def _hooked(model: Any, names: Iterable[str], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call `see` with the name and the input of each of these layers, before it runs."""

    def hook(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        return lambda _module, arguments: see(name, arguments[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_not_finite(name: str, rows: torch.Tensor, first: int) -> None:
    """rows [n, K] of the tokens from position `first` on."""
    # A sum is not finite if a number is not; the costly look at each is for when it is not.
    if bool(torch.isfinite(rows.sum(dtype=torch.float64))):
        return
    bad = (~torch.isfinite(rows)).any(dim=1).nonzero()
    if len(bad):
        raise UsageError(
            problem(
                f"inputs of '{name}'",
                received=f"NaN or Inf at position {first + int(bad[0])}",
                expected="finite activations",
                fix="check the model's weights",
            )
        )
