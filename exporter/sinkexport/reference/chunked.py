"""Sinks + window in torch, a chunk of tokens at a time: what streaming token by token gives, many times faster.

For `eval --compare` and for tables over many S and W, which need no export. The model's own code runs; only its
rotation is replaced by one with exact phases, and its attention by one over sinks, window and chunk with a mask by
distance. It shares with the exported graphs what `families` reads off a model, and the geometry of a layer's cache
(`ExportConfig.ring`). Phases, and how tokens are kept, masked and attended, are written here a second time, so that its
agreement with a bundle says something about both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from sinkrt.ring import Ring

from sinkexport.config import ExportConfig
from sinkexport.families.interface import as_many_heads, intercept_attention, layer_of, refuse_arguments
from sinkexport.families.probe import probe_attention
from sinkexport.families.recurrent import recurrent_cache, steps_like_texts, with_cache
from sinkexport.families.rope import ModelRotary, RotarySpec, identity_rotary, replaced_rotary
from sinkexport.families.shape import AttentionShape
from sinkexport.families.weights_after import WEIGHT, without_weights
from sinkexport.reference.affine import AffineReference
from sinkexport.reference.chunk_attention import CosSin, Entries, logits_of, rotated, turn, visible, weighted
from sinkexport.reference.kept_tokens import CacheHeads, KeptTokens, heads_by_cache
from sinkexport.reference.own_attention import no_reference
from sinkexport.reference.streaming import LIKE_DENSE, NUM_TRIED
from sinkexport.targets import ONNX
from sinkexport.variants.variant import PLAIN, AttentionVariant


@contextlib.contextmanager
def chunked_streaming(
    model: Any,
    num_sink_tokens: int,
    window_size: int,
    kv: str = "fp",
    variant: AttentionVariant = PLAIN,
) -> Iterator[ChunkedStream]:
    """Make `model` stream with S = num_sink_tokens >= 0 and W = window_size >= 1 for the length of a context.

    kv: ``fp``, or ``int8``: the window's keys and values are rounded to INT8 as they come, those of sinks are not.
    variant: what is changed of the model's attention.

    The model, in evaluation mode, is changed inside and left as it was, also after an exception.

    Raises: UsageError for a bad geometry and for a model whose attention or positions cannot be followed exactly.
    """
    config = ExportConfig(num_sink_tokens, window_size, chunk_size=1, target=ONNX.option, kv=kv)
    variant.check_window_size(window_size)
    shape, rotary = probe_attention(model, model.config.get_text_config().num_hidden_layers, config.capacity)
    stream = ChunkedStream(model, config, shape, rotary, variant)
    if shape.recurrent:
        stream.max_tokens = _max_tokens(model, shape, rotary)
    with _streaming(model, stream, rotary):
        yield stream


@contextlib.contextmanager
def _streaming(model: Any, stream: ChunkedStream, rotary: ModelRotary) -> Iterator[None]:
    """Let the model's attention calls go to `stream` inside a context."""
    identity = identity_rotary(rotary, 1, 1, next(model.parameters()).dtype)
    with (
        intercept_attention(model, stream.attend),
        replaced_rotary(model, identity),
        without_weights(model, rotary.norms),
        stream.affine.watching(model),
        steps_like_texts(model),
    ):
        yield


def _max_tokens(model: Any, shape: AttentionShape, rotary: ModelRotary) -> int | None:
    """Tokens that transformers' recurrent layers may get in one call after others; None: as many as one likes.

    By the Mamba layers of transformers 5.23 several tokens begin anew, or from a state that is not theirs.

    Raises: UsageError if however a text is cut, it has other logits than in one pass.
    """
    vocab_size = model.config.get_text_config().vocab_size
    ids = torch.randint(vocab_size, (1, NUM_TRIED), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits.double()  # [1, n, vocab]
    limit = LIKE_DENSE.get(next(model.parameters()).dtype, 1e-3)
    for max_tokens, length in ((None, NUM_TRIED // 2), (1, 1)):
        stream = ChunkedStream(model, ExportConfig(0, NUM_TRIED, chunk_size=1, target=ONNX.option), shape, rotary)
        with _streaming(model, stream, rotary):
            logits = torch.cat([stream.feed(part) for part in ids.split(length, dim=1)], dim=1).double()
        error = ((logits - dense).abs().amax(dim=-1) / dense.std(dim=-1).clamp(min=1e-9)).max()
        if float(error) <= limit:
            return max_tokens
    raise no_reference(
        f"a text whose logits are {float(error):.1e} of their spread off as it is cut", "recurrent states"
    )


class ChunkedStream:
    """The streams of one `chunked_streaming` context: B of them, in step, B being that of the first ids."""

    def __init__(
        self,
        model: Any,
        config: ExportConfig,
        shape: AttentionShape,
        rotary: ModelRotary,
        variant: AttentionVariant = PLAIN,
    ) -> None:
        self._model = model
        self._config = config
        self._caches = heads_by_cache(config, variant, shape)
        self._rotary = rotary
        tuning = variant.sink_tuning
        self._scale = None if tuning is None else torch.tensor(tuning.first_token_scale).log()  # [L, Hq]
        self._act = variant.act
        self.affine = AffineReference(variant.affine)
        self._kept = KeptTokens(config)
        self._recurrent = recurrent_cache(model)  # of the layers without softmax attention
        self._position = 0  # of the chunk's first token
        self.max_tokens: int | None = None
        """Tokens of one call of the model; None: as many as one likes."""
        self._num_calls = 0  # of attention, in the chunk that runs
        # Of the chunk that runs, the same in all layers of one geometry or table of frequencies.
        self._entries: dict[Ring, Entries] = {}
        self._turns: dict[tuple[str, int], CosSin] = {}

    @property
    def position(self) -> int:
        """Tokens fed to each stream so far. Set it to go on elsewhere with the same cache."""
        return self._position

    @position.setter
    def position(self, tokens: int) -> None:
        self._position = tokens

    def feed(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed T >= 1 tokens to each stream, T as it likes in every call. ids: int64 [B, T].

        Returns: logits [B, T, vocab] after each token, in the model's dtype.
        """
        num_tokens, self._num_calls = ids.shape[1], 0
        # Query scales are known for so many positions.
        limit = self._config.capacity if self._rotary.query_scales else self.max_tokens
        if limit is not None and num_tokens > limit:
            return torch.cat([self.feed(part) for part in ids.split(limit, dim=1)], dim=1)
        self._entries = {ring: visible(ring, self._position, num_tokens) for ring in {c.ring for c in self._caches}}
        self._turns = {
            (table, behind): turn(self._position, num_tokens, behind, content.frequency)
            for table, content in self._rotary.tables.items()
            for behind in {0, self._config.capacity - 1, *(ring.capacity - 1 for ring in self._entries)}
        }
        positions = self._in_cache_positions(num_tokens).expand(ids.shape)
        with torch.no_grad():
            # Positions reach queries and the rotary embedding, which is replaced.
            output = self._model(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,
                **with_cache(self._model, self._recurrent),
            )
        self._position += num_tokens
        logits: torch.Tensor = output.logits
        return logits

    def reset(self) -> None:
        """Forget all tokens."""
        self._kept.clear()
        self._recurrent = recurrent_cache(self._model)
        self._position = 0

    def attend(
        self,
        module: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        _mask: torch.Tensor | None = None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' attention interface: q [B, Hq, T, D], k and v [B, Hkv, T, D or Dv] -> [B, T, Hq, Dv]."""
        call = self._num_calls
        self._num_calls += 1
        refuse_arguments(layer_of(module), others)
        k, v = as_many_heads(k, v)
        if call in self._rotary.query_scales:  # the model took the tokens for the first T of a text
            scales, num_tokens = self._rotary.query_scales[call], q.shape[2]
            factors = scales[self._in_cache_positions(num_tokens)] / scales[:num_tokens]
            q = q * factors[:, None].to(q.dtype)
        q = q * (scaling if scaling is not None else q.shape[-1] ** -0.5)  # here: logits are many more
        caches = [cache for cache in self._caches if cache.call == call]
        out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=v.dtype)  # [B, Hq, T, D]
        for cache in caches:
            kv_heads, q_heads = list(cache.kv_heads), list(cache.q_heads)
            per_head = (None if x is None else x[q_heads] for x in (s_aux, alibi_slopes))
            out[:, q_heads] = self._attended(
                module, cache, q[:, q_heads], k[:, kv_heads], v[:, kv_heads], softcap, *per_head
            )
        return out.transpose(1, 2).contiguous(), None

    def _attended(
        self,
        module: Any,
        cache: CacheHeads,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softcap: float | None,
        s_aux: torch.Tensor | None,
        alibi_slopes: torch.Tensor | None,
    ) -> torch.Tensor:
        """The heads of one cache: q [B, Hq, T, D], scaled, k and v [B, Hkv, T, D] -> [B, Hq, T, D]."""
        spec, ring, q_sink = self._rotary.calls[cache.call], cache.ring, q
        if spec.rotary_dim:
            factor, turn = self._rotary.tables[spec.table].scaling, self._turns[spec.table, 0]
            q, k = (rotated(x, turn, spec, factor) for x in (q, k))
            if spec.norms:
                q = self._weighed(q, spec)
            cos, sin = self._turns[spec.table, ring.capacity - 1]
            q_sink = rotated(q, (cos, -sin), spec)
        seen = self._kept.with_chunk(cache, k, v, self._position)
        logits = torch.cat((logits_of(q_sink, seen.sink_k), logits_of(q, seen.window_k)), dim=-1)  # [B, Hq, T, n]
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        entries, logits = self._entries[ring], logits.float()
        if self._scale is not None and ring.num_sink_tokens:
            # The first of the sinks is token 0.
            logits[..., 0] += self._scale[cache.layer, list(cache.q_heads)][:, None]
        if alibi_slopes is not None:
            logits -= alibi_slopes[:, None, None] * entries.distance
        logits.masked_fill_(~entries.is_seen, float("-inf"))
        if s_aux is not None:  # one more logit, without a value
            logits = torch.cat((logits, s_aux.float()[:, None, None].expand(*logits.shape[:-1], 1)), dim=-1)
        weights = logits.softmax(dim=-1)[..., : entries.is_seen.shape[1]]
        if self._act is not None and ring.num_sink_tokens:
            weights = self._kept.calibrated(self._act, cache, weights, entries, self._position)
        values = torch.cat((seen.sink_v, seen.window_v), dim=2)
        out = weighted(weights.to(v.dtype), values).transpose(1, 2)  # [B, T, Hq, D]
        out = self.affine.changed(module, out, values, entries.is_seen, cache.q_heads).transpose(1, 2)
        self._kept.keep(cache, seen)
        return out

    def _in_cache_positions(self, num_tokens: int) -> torch.Tensor:
        """int64 [T]: in-cache positions of the chunk's tokens as queries."""
        return torch.arange(self._position, self._position + num_tokens).clamp(max=self._config.capacity - 1)

    def _weighed(self, q: torch.Tensor, spec: RotarySpec) -> torch.Tensor:
        """Queries at their stream positions, weighed at their in-cache positions; sinkexport.families.weights_after."""
        cos, sin = self._turns[spec.table, self._config.capacity - 1]
        q = rotated(q, (cos, -sin), spec)
        for name in spec.norms:
            q = q * self._model.get_submodule(name).get_parameter(WEIGHT)
        return rotated(q, (cos, sin), spec)
