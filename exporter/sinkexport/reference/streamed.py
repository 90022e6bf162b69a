"""A model's logits over a stream, by the reference that can follow it: the faster one, or the one for every family."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from sinkrt.errors import UsageError

from sinkexport.families.refusals import refusing
from sinkexport.reference.calls import calls_reference
from sinkexport.reference.chunked import chunked_streaming
from sinkexport.reference.streaming import streaming_reference
from sinkexport.util.arrays import Logits
from sinkexport.variants.variant import PLAIN, AttentionVariant

RE_ROTATING, CALL_FOLLOWING = "re-rotating", "call-following"
"""Names of `sinkexport.reference.streaming` and of `sinkexport.reference.calls`."""


@dataclasses.dataclass(frozen=True)
class Streamed:
    """The logits [B, vocab] after each of the first num_tokens tokens, computed as they are asked for.

    reference: ``RE_ROTATING | CALL_FOLLOWING``.
    """

    reference: str
    num_tokens: int
    logits: Iterator[torch.Tensor]


@contextlib.contextmanager
def streamed_logits(
    model: Any,
    ids: torch.Tensor,
    num_sink_tokens: int,
    window_size: int,
    variant: AttentionVariant = PLAIN,
    max_work: float = float("inf"),
    *,
    follow_calls: bool = False,
) -> Iterator[Streamed]:
    """Stream ids int64 [B, N] through `model` with S = num_sink_tokens and W = window_size inside a context.

    max_work: parameters times tokens that the call-following reference may compute. It runs the model on S + W tokens
    for each one, and stops where that would be more. follow_calls: take it even where the other one would do.

    Raises: UsageError if neither reference can follow the model.
    """
    geometry = num_sink_tokens, window_size
    with contextlib.ExitStack() as stack:
        rotating = None
        if not follow_calls:
            with contextlib.suppress(UsageError), refusing(model, "streaming it"):
                rotating = stack.enter_context(streaming_reference(model, *geometry, variant=variant))
        if rotating is not None:
            yield Streamed(RE_ROTATING, ids.shape[1], map(rotating.step, ids.T))
            return
        calls = stack.enter_context(calls_reference(model, *geometry, variant))
        num_tokens = calls.affordable(ids.shape[1], ids.shape[0], max_work)
        yield Streamed(CALL_FOLLOWING, num_tokens, calls.logits(ids[:, :num_tokens]))


def logits_of_int8_window(
    model: Any, ids: torch.Tensor, num_sink_tokens: int, window_size: int, variant: AttentionVariant = PLAIN
) -> Logits | None:
    """Logits [B, N, vocab] after each of ids int64 [B, N], as `streamed_logits`, keys and values rounded to INT8.

    None: no reference can follow the model.
    """
    try:
        with torch.no_grad(), chunked_streaming(model, num_sink_tokens, window_size, "int8", variant) as stream:
            logits: Logits = stream.feed(ids).float().numpy()
    except UsageError:
        return None
    return logits
