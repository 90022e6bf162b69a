"""Sinks + window in one pass of a model over a whole text: as many queries at once as there are tokens.

The streaming reference takes a step of the model for each token, a thousand of them before a usual cache is full. One
pass costs a few seconds. Each query attends once to tokens as they stand in the text, for its window, and once to the
sinks as they stand in the cache: the two share a softmax because query and keys of either kind have dimensions of
their own, where the other kind has zeros. Rotation and attention are the model's own functions, as in the reference.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch

from sinkexport.model.interface import intercept_attention
from sinkexport.own_attention import plain_attention
from sinkexport.reference import StreamingReference


def logits_of_last(
    model: Any, ids: torch.Tensor, num_sink_tokens: int, window_size: int, num_last: int
) -> torch.Tensor:
    """Logits [B, num_last, vocab] after the last tokens of ids [B, N], in the model's dtype.

    The model, in evaluation mode, must have rotary positions that do not depend on a text's length, or none.

    Raises: UsageError if the model's attention or rotation cannot be followed.
    """
    reference = StreamingReference(model, num_sink_tokens, window_size)
    reference.learn_rotation()
    with one_pass(reference), torch.no_grad():
        arguments = {"logits_to_keep": num_last} if _keeps_logits(model) else {}
        logits: torch.Tensor = model(input_ids=ids, use_cache=False, **arguments).logits[:, -num_last:]
    return logits


@contextlib.contextmanager
def one_pass(reference: StreamingReference) -> Iterator[None]:
    """The reference's model attends to sinks and window at every place of a text, for the length of a context."""

    def attend(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _mask: Any = None, **arguments: Any
    ) -> tuple[torch.Tensor, None]:
        num_sinks, window_size = reference.geometry(arguments.get("sliding_window"))
        num_tokens = q.shape[2]
        place = torch.arange(num_tokens)
        q_sink = q
        if reference.rotates(module):
            q_sink = reference.turned(module, q, place.clamp(max=num_sinks + window_size - 1))
            q, k = (reference.turned(module, x, place) for x in (q, k))
        k_sink = k[:, :, :num_sinks]
        behind = place[:, None] - place
        in_window = (behind >= 0) & (behind < window_size) & (place >= num_sinks)
        seen = torch.cat((in_window, behind[:, :num_sinks] >= 0), dim=1)  # [N, N + S]
        mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, float("-inf"))[None, None]
        arguments["scaling"] = q.shape[-1] ** -0.5 if arguments.get("scaling") is None else arguments["scaling"]
        queries = torch.cat((q, q_sink), dim=-1)  # [B, Hq, N, 2 D]
        zeros, none = torch.zeros_like(k), torch.zeros_like(k_sink)
        keys = torch.cat((torch.cat((k, zeros), dim=-1), torch.cat((none, k_sink), dim=-1)), dim=2)
        values = torch.cat((v, v[:, :, :num_sinks]), dim=2)
        return plain_attention(module)(module, queries, keys, values, mask, **arguments)[0], None

    with intercept_attention(reference.model, attend), reference.no_rotation():
        yield


def _keeps_logits(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters
