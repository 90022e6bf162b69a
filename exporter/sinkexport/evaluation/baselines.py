"""The bundle and the baselines that `eval` compares over a long text, as in the figures of arXiv:2309.17453.

Each function takes the whole text, ids int64 [N], and returns a `Predictor`, which computes nothing until it is
started.
Only baselines import torch: a bundle is evaluated without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sinkexport.evaluation.perplexity import Ids, Prediction, Predictor
from sinkexport.variants.variant import PLAIN, AttentionVariant

CHUNK_TOKENS = 256
"""Tokens that a model in torch takes at once: enough to keep its matmuls busy."""


class Stream(Protocol):
    """The part of a `sinkrt.Session` of one stream that is used here."""

    def reset(self) -> None: ...
    def step(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]: ...


def bundle(session: Stream, ids: Ids, note: str) -> Predictor:
    """Run the bundle's decode graph token by token, as it is deployed."""

    def predictions() -> Iterator[Prediction]:
        session.reset()
        for t in range(len(ids) - 1):
            yield Prediction(t + 1, session.step(ids[t : t + 1]))

    return Predictor("bundle", note, len(ids) - 1, predictions)


def sinks_and_window(
    model: Any,
    ids: Ids,
    num_sink_tokens: int,
    window_size: int,
    *,
    name: str,
    chunk_tokens: int = CHUNK_TOKENS,
    variant: AttentionVariant = PLAIN,
) -> Predictor:
    """Keep S sinks and a window of W tokens in torch; S = 0 is window-only attention. See `chunked_streaming`."""

    def predictions() -> Iterator[Prediction]:
        import torch

        from sinkexport.reference.chunked import chunked_streaming

        with chunked_streaming(model, num_sink_tokens, window_size, variant=variant) as stream:
            for start, piece in _pieces(ids[:-1], chunk_tokens):
                yield Prediction(start + 1, _numpy(stream.feed(torch.from_numpy(piece)[None])))

    return Predictor(name, f"torch, {num_sink_tokens} sinks + {window_size}", len(ids) - 1, predictions)


def dense(model: Any, ids: Ids, max_tokens: int, *, chunk_tokens: int = CHUNK_TOKENS) -> Predictor:
    """Run transformers' own model and cache, which keeps every token; end with `max_tokens` tokens in the cache."""
    num_tokens = min(len(ids) - 1, max_tokens)
    return Predictor(
        "dense",
        f"transformers, up to {num_tokens} tokens",
        num_tokens,
        lambda: _dense(model, ids[:num_tokens], chunk_tokens),
    )


def recomputation(model: Any, ids: Ids, capacity: int, block_tokens: int) -> Predictor:
    """Run the model anew on the latest tokens, with positions from 0: what StreamingLLM replaces.

    Once `capacity` = C tokens have been read, each run is over C tokens and predicts the last 1 <= block_tokens <= C of
    them. So a token is predicted from the C - block_tokens + 1 .. C tokens before it. block_tokens = 1 is exact and
    needs a run for every token.
    """
    least = capacity - block_tokens + 1
    note = f"transformers, last {capacity}" if block_tokens == 1 else f"transformers, last {least} to {capacity}"

    def predictions() -> Iterator[Prediction]:
        import torch

        inputs = ids[:-1]
        yield from _dense(model, inputs[:capacity], CHUNK_TOKENS)
        for first in range(capacity, len(inputs), block_tokens):  # the first input whose prediction is new
            end = min(first + block_tokens, len(inputs))
            context = torch.from_numpy(inputs[end - capacity : end])[None]  # [1, C]
            with torch.no_grad():
                logits = model(input_ids=context, use_cache=False, logits_to_keep=end - first).logits
            yield Prediction(first + 1, _numpy(logits))

    return Predictor("recompute", note, len(ids) - 1, predictions)


def _dense(model: Any, inputs: Ids, chunk_tokens: int) -> Iterator[Prediction]:
    import torch
    import transformers

    from sinkexport.families.recurrent import with_cache

    given = with_cache(model, transformers.DynamicCache(config=model.config))
    for start, piece in _pieces(inputs, chunk_tokens):
        with torch.no_grad():
            output = model(input_ids=torch.from_numpy(piece)[None], use_cache=True, **given)
        yield Prediction(start + 1, _numpy(output.logits))


def _pieces(inputs: Ids, length: int) -> Iterator[tuple[int, Ids]]:
    """Yield (index of its first token, tokens) of each piece of at most `length` tokens."""
    for start in range(0, len(inputs), length):
        yield start, inputs[start : start + length]


def _numpy(logits: Any) -> npt.NDArray[np.float32]:
    """Convert a tensor [1, T, vocab] to float32 [T, vocab]."""
    array: npt.NDArray[np.float32] = logits[0].float().numpy()
    return array
