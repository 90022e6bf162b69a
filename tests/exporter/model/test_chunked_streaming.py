"""Chunks of any length give what the reference gives token by token, for every family and geometry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sinkexport.families.recurrent import layers_without_attention
from sinkexport.model.attention import stream_angles
from sinkexport.reference.chunk_attention import turn, visible
from sinkexport.reference.chunked import chunked_streaming
from sinkexport.reference.streaming import streaming_reference
from sinkrt.errors import UsageError
from sinkrt.ring import Ring, phase_frequency

from tests.exporter.tiny_models import RE_ROTATED, VOCAB_SIZE, tiny_model

B = 2


def random_ids(steps: int, seed: int = 0) -> torch.Tensor:
    """int64 [B, steps], each stream with ids of its own."""
    return torch.randint(3, VOCAB_SIZE, (B, steps), generator=torch.Generator().manual_seed(seed))


def by_token(model: Any, ids: torch.Tensor, num_sink_tokens: int, window_size: int) -> torch.Tensor:
    with streaming_reference(model, num_sink_tokens, window_size) as reference:
        return torch.stack([reference.step(ids[:, t]) for t in range(ids.shape[1])], dim=1)


def by_chunk(model: Any, ids: torch.Tensor, num_sink_tokens: int, window_size: int, chunk: int) -> torch.Tensor:
    with chunked_streaming(model, num_sink_tokens, window_size) as stream:
        pieces = [stream.feed(piece) for piece in ids.split(chunk, dim=1)]
        assert stream.position == ids.shape[1]
    return torch.cat(pieces, dim=1)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error of a logit as a share of the logits' spread."""
    return float((got - want).abs().max() / want.std())


GEOMETRIES = [(3, 7, 5), (5, 11, 2), (0, 9, 4), (4, 1, 3), (1, 13, 40)]
"""S, W and chunk. Sinks in a chunk; straddling three; none; the least window; a chunk of several windows."""


@pytest.mark.parametrize(
    ("name", "num_sink_tokens", "window_size", "chunk"),
    [
        *((name, *GEOMETRIES[0]) for name in RE_ROTATED),
        *((name, *one) for name in ("llama", "smollm3", "gemma3_text", "gpt_oss", "bloom") for one in GEOMETRIES[1:]),
    ],
    ids=str,
)
def test_equals_the_reference(name: str, num_sink_tokens: int, window_size: int, chunk: int) -> None:
    model = tiny_model(name)
    ids = random_ids(num_sink_tokens + 5 * window_size + 3)
    want = by_token(model, ids, num_sink_tokens, window_size)
    got = by_chunk(model, ids, num_sink_tokens, window_size, chunk)
    # transformers sums linear attention in another order over a chunk than over single tokens.
    assert error(got, want) < (1e-3 if layers_without_attention(model) else 1e-4)
    # It would show if the sinks' distance were wrong, or one token more or less were kept.
    other = by_chunk(model, ids, num_sink_tokens, window_size + 1, chunk)
    assert error(other, want) > 1e-2


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 6), st.integers(1, 12), st.lists(st.integers(1, 17), min_size=1, max_size=8))
def test_any_split_of_the_stream_is_the_same(num_sink_tokens: int, window_size: int, lengths: list[int]) -> None:
    model = tiny_model("llama3-rope")
    ids = random_ids(sum(lengths))
    want = by_token(model, ids, num_sink_tokens, window_size)
    with chunked_streaming(model, num_sink_tokens, window_size) as stream:
        got = torch.cat([stream.feed(piece) for piece in ids.split(lengths, dim=1)], dim=1)
    assert error(got, want) < 1e-4


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 6), st.integers(1, 9), st.integers(0, 40), st.integers(1, 20))
def test_a_token_sees_what_the_ring_holds(num_sink_tokens: int, window_size: int, position: int, length: int) -> None:
    ring = Ring(num_sink_tokens, window_size)
    seen = visible(ring, position, length).is_seen
    end = position + length
    sinks = list(range(min(num_sink_tokens, end)))
    columns = sinks + list(range(end - (seen.shape[1] - len(sinks)), end))
    for i in range(length):
        tokens = tuple(token for token, sees in zip(columns, seen[i].tolist(), strict=True) if sees)
        assert tokens == ring.cached_tokens(position + i)


def test_far_from_the_start_angles_stay_exact() -> None:
    """2^32 tokens turn any phase by whole turns; an angle computed in float32 would be noise there."""
    ids = random_ids(60)
    with chunked_streaming(tiny_model("llama"), 0, 8) as stream:  # without sinks: their distance ends growing
        stream.feed(ids[:, :20])
        want = stream.feed(ids[:, 20:])
        stream.reset()
        stream.feed(ids[:, :20])
        stream.position += 2**32
        got = stream.feed(ids[:, 20:])
    assert torch.equal(got, want)


def test_reset_forgets() -> None:
    ids = random_ids(30)
    with chunked_streaming(tiny_model("qwen3"), 3, 6) as stream:
        first = stream.feed(ids)
        assert error(stream.feed(ids), first) > 1e-2
        stream.reset()
        assert torch.equal(stream.feed(ids), first)


def test_memory_does_not_grow_with_the_stream() -> None:
    with chunked_streaming(tiny_model("llama"), 3, 6) as stream:
        sizes = set()
        for piece in random_ids(90).split(10, dim=1):
            stream.feed(piece)
            sizes.add(
                sum(x.untyped_storage().nbytes() for kept in stream._kept.rows.values() for x in vars(kept).values())
            )
    assert len(sizes) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model, ids = tiny_model("gpt_neox"), random_ids(20)
    with torch.no_grad():
        want = model(ids).logits
    try:
        with chunked_streaming(model, 1, 4) as stream:
            stream.feed(ids)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="window_size"), chunked_streaming(tiny_model("llama"), 4, 0):
        pass
    learned = transformers.GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4)
    gpt2 = transformers.AutoModelForCausalLM.from_config(learned).eval()
    with pytest.raises(UsageError, match="rotary"), chunked_streaming(gpt2, 4, 8):
        pass


@pytest.mark.parametrize("position", [0, 5, 2**24 + 1, 2**33 + 7, 2**46])
def test_phases_are_those_of_the_exported_graphs(position: int) -> None:
    """To the bit, and without shared code: calibration files depend on every bit."""
    frequency = torch.tensor([phase_frequency(10000 ** (-i / 8)) for i in range(8)], dtype=torch.int64)
    for behind in (0, 11):
        want = stream_angles(torch.tensor([position]), frequency, 4, behind)
        got = turn(position, 4, behind, frequency)
        for ours, theirs in zip(got, want, strict=True):
            assert torch.equal(ours, theirs[0])
