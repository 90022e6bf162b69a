"""Sinks + window in torch, a chunk of tokens at a time: what streaming token by token gives, many times faster.

For `eval --compare` and for tables over many S and W, which need no export. The model's own code runs; only its
rotation is replaced by one with exact phases, and its attention by one over sinks, window and chunk with a mask by
distance. It shares with the exported graphs what `families` reads off a model, and the geometry of a layer's cache
(`ExportConfig.ring`). Phases, and how tokens are kept, masked and attended, are written here a second time, so that its
agreement with a bundle says something about both.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sinkrt.contract import ActTuning
from sinkrt.ring import Ring

from sinkexport.config import ExportConfig
from sinkexport.families.interface import as_many_heads, intercept_attention, layer_of, refuse_arguments
from sinkexport.families.probe import probe_attention
from sinkexport.families.recurrent import recurrent_cache, steps_like_texts, with_cache
from sinkexport.families.rope import ModelRotary, RotarySpec, identity_rotary, replaced_rotary, rotate
from sinkexport.families.shape import AttentionShape
from sinkexport.families.weights_after import WEIGHT, without_weights
from sinkexport.reference.affine import AffineReference
from sinkexport.reference.own_attention import no_reference
from sinkexport.reference.streaming import LIKE_DENSE, NUM_TRIED
from sinkexport.variants.variant import PLAIN, AttentionVariant

CosSin = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, float32 [T, R/2] each."""

TINY = 1e-30
"""Lower bound of a sum of weights that divides."""


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
    config = ExportConfig(num_sink_tokens=num_sink_tokens, window_size=window_size, chunk_size=1, kv=kv)
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
        stream = ChunkedStream(model, ExportConfig(0, NUM_TRIED, chunk_size=1), shape, rotary)
        with _streaming(model, stream, rotary):
            logits = torch.cat([stream.feed(part) for part in ids.split(length, dim=1)], dim=1).double()
        error = ((logits - dense).abs().amax(dim=-1) / dense.std(dim=-1).clamp(min=1e-9)).max()
        if float(error) <= limit:
            return max_tokens
    raise no_reference(
        f"a text whose logits are {float(error):.1e} of their spread off as it is cut", "recurrent states"
    )


@dataclasses.dataclass(frozen=True)
class _Heads:
    """Heads of one attention call whose caches have one geometry. kv_heads, q_heads: their indices in the call."""

    call: int
    layer: int
    kv_heads: tuple[int, ...]
    q_heads: tuple[int, ...]
    ring: Ring


def _heads(config: ExportConfig, variant: AttentionVariant, shape: AttentionShape) -> tuple[_Heads, ...]:
    """The heads of all attention calls, by cache."""
    found = []
    for index, call in enumerate(shape.calls):
        windows = variant.windows(call.layer, call.num_kv_heads, config.window_size)
        rings = [config.ring(call.sliding_window, window) for window in windows]
        for ring in dict.fromkeys(rings):
            kv_heads = tuple(head for head, own in enumerate(rings) if own == ring)
            q_heads = tuple(q for head in kv_heads for q in call.query_heads(head))
            found.append(_Heads(call=index, layer=call.layer, kv_heads=kv_heads, q_heads=q_heads, ring=ring))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Rows that the heads of one cache carry from chunk to chunk, keys rotated at their stream positions.

    sink_k, sink_v: [B, Hkv, n <= S, D and Dv]. window_k, window_v: [B, Hkv, n <= W - 1, D and Dv], oldest first.
    """

    sink_k: torch.Tensor
    sink_v: torch.Tensor
    window_k: torch.Tensor
    window_v: torch.Tensor


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
        self._caches = _heads(config, variant, shape)
        self._rotary = rotary
        tuning = variant.sink_tuning
        self._scale = None if tuning is None else torch.tensor(tuning.first_token_scale).log()  # [L, Hq]
        self._act = variant.act
        self._received: dict[_Heads, torch.Tensor] = {}  # [B, Hq, n], by the tokens in `_kept`'s window
        self.affine = AffineReference(variant.affine)
        self._kept: dict[_Heads, _Kept] = {}
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
        self._received.clear()
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
        cache: _Heads,
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
            q, k = (_rotated(x, turn, spec, factor) for x in (q, k))
            if spec.norms:
                q = self._weighed(q, spec)
            cos, sin = self._turns[spec.table, ring.capacity - 1]
            q_sink = _rotated(q, (cos, -sin), spec)
        seen = self._with_chunk(cache, k, v)
        logits = torch.cat((_logits(q_sink, seen.sink_k), _logits(q, seen.window_k)), dim=-1)  # [B, Hq, T, n]
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
            weights = self._calibrated(self._act, cache, weights, entries)
        values = torch.cat((seen.sink_v, seen.window_v), dim=2)
        out = _weighted(weights.to(v.dtype), values).transpose(1, 2)  # [B, T, Hq, D]
        out = self.affine.changed(module, out, values, entries.is_seen, cache.q_heads).transpose(1, 2)
        self._keep(cache, seen)
        return out

    def _in_cache_positions(self, num_tokens: int) -> torch.Tensor:
        """int64 [T]: in-cache positions of the chunk's tokens as queries."""
        return torch.arange(self._position, self._position + num_tokens).clamp(max=self._config.capacity - 1)

    def _weighed(self, q: torch.Tensor, spec: RotarySpec) -> torch.Tensor:
        """Queries at their stream positions, weighed at their in-cache positions; sinkexport.families.weights_after."""
        cos, sin = self._turns[spec.table, self._config.capacity - 1]
        q = _rotated(q, (cos, -sin), spec)
        for name in spec.norms:
            q = q * self._model.get_submodule(name).get_parameter(WEIGHT)
        return _rotated(q, (cos, sin), spec)

    def _calibrated(self, act: ActTuning, cache: _Heads, weights: torch.Tensor, entries: Entries) -> torch.Tensor:
        """weights [B, Hq, T, n], float32, with later sinks scaled down in the heads of `act`."""
        heads = torch.tensor(act.heads[cache.layer])[list(cache.q_heads)].float()  # [Hq]
        if not heads.any():
            return weights
        ring, num_tokens = cache.ring, weights.shape[2]
        sinks = weights.shape[3] - len(entries.window)
        window = weights[..., sinks:]  # [B, Hq, T, w]
        before = self._received.get(cache, window[:, :, 0, :0])  # of the window's oldest
        before = torch.nn.functional.pad(before, (0, window.shape[3] - before.shape[2]))
        received = before[:, :, None] + window.cumsum(dim=2)
        last = min(ring.window_size - 1, window.shape[3])
        self._received[cache] = received[:, :, -1, window.shape[3] - last :].clone()
        query = torch.arange(self._position, self._position + num_tokens)[:, None]
        queries = (query - entries.window + 1).clamp(min=1)  # [T, w]
        share = (query + 1).clamp(max=ring.capacity) / queries / act.alpha
        degree = (received * share - 1).clamp(0, 1) * (queries >= act.min_queries) * heads[:, None, None]
        taken = degree * window
        rest = torch.cat((weights[..., :sinks], window - taken), dim=-1)
        freed = (1 - act.beta) * taken.sum(dim=-1, keepdim=True)
        calibrated = rest * (1 + freed / rest.sum(dim=-1, keepdim=True).clamp(min=TINY))
        calibrated[..., sinks:] += act.beta * taken
        return calibrated

    def _with_chunk(self, cache: _Heads, k: torch.Tensor, v: torch.Tensor) -> _Kept:
        """Rows that are kept and those of the chunk, k and v [B, Hkv, T, D], sorted into sinks and window."""
        no_k, no_v = k[:, :, :0], v[:, :, :0]
        kept = self._kept.get(cache, _Kept(sink_k=no_k, sink_v=no_v, window_k=no_k, window_v=no_v))
        sinks = max(0, cache.ring.num_sink_tokens - self._position)  # leading tokens of the chunk
        return _Kept(
            sink_k=torch.cat((kept.sink_k, k[:, :, :sinks]), dim=2),
            sink_v=torch.cat((kept.sink_v, v[:, :, :sinks]), dim=2),
            window_k=torch.cat((kept.window_k, self._as_stored(k[:, :, sinks:])), dim=2),
            window_v=torch.cat((kept.window_v, self._as_stored(v[:, :, sinks:])), dim=2),
        )

    def _as_stored(self, rows: torch.Tensor) -> torch.Tensor:
        """Keys or values [B, Hkv, n, D] as the window holds them: here in floating point, rounded if it is INT8."""
        if not self._config.has_int8_window:
            return rows
        x = rows.float()
        scale = (x.abs().amax(dim=-1, keepdim=True) / 127).clamp(2.0**-17, 65504.0).half().float()
        return (torch.clamp((x / scale).round(), -127, 127) * scale).to(rows.dtype)

    def _keep(self, cache: _Heads, seen: _Kept) -> None:
        """Keep the last W - 1 tokens of the window: with itself, the next token has W."""
        first = max(0, seen.window_k.shape[2] - (cache.ring.window_size - 1))
        # clone: a slice would hold on to the memory of all that it was cut from
        self._kept[cache] = _Kept(
            sink_k=seen.sink_k,
            sink_v=seen.sink_v,
            window_k=seen.window_k[:, :, first:].clone(),
            window_v=seen.window_v[:, :, first:].clone(),
        )


@dataclasses.dataclass(frozen=True)
class Entries:
    """Tokens that a chunk attends to: the sinks there are, then the window's tokens, n together.

    is_seen: bool [T, n]. distance: int64 [T, n], in the cache; any where nothing is seen. The window's columns begin
    with the oldest token that the chunk's first one sees, and end with the chunk's last. window: int64, those tokens.
    """

    is_seen: torch.Tensor
    distance: torch.Tensor
    window: torch.Tensor


def visible(ring: Ring, position: int, num_tokens: int) -> Entries:
    """The entries of a chunk whose first token is at `position`."""
    num_sinks, window_size = ring.num_sink_tokens, ring.window_size
    end = position + num_tokens
    query = torch.arange(position, end)[:, None]  # [T, 1]
    sinks = torch.arange(min(num_sinks, end))
    first = max(num_sinks, position - window_size + 1)
    window = torch.arange(first, max(first, end))  # none while all tokens are sinks
    is_seen = torch.cat((sinks <= query, (window <= query) & (query - window < window_size)), dim=1)
    place = query.clamp(max=ring.capacity - 1)  # from there on a sink's distance stays
    return Entries(is_seen=is_seen, distance=torch.cat((place - sinks, query - window), dim=1), window=window)


def turn(position: int, num_tokens: int, behind: int, frequency: torch.Tensor) -> CosSin:
    """cos and sin of ``max(0, t - behind) * frequency`` turns for T tokens from `position` on.

    frequency: int64 [R/2], turns a token in units of 2^-32. Products wrap modulo 2^64, so phases modulo 2^32 are exact.
    Their angles are rounded to float32, as graphs round them, with an error of 2^-22 pi at most. Calibration streams by
    this: its files, and bundles made from them, depend on every bit.
    """
    t = np.maximum(np.arange(position, position + num_tokens) - behind, 0).astype(np.uint64)
    phase = (t[:, None] * frequency.numpy().astype(np.uint64)).astype(np.uint32).astype(np.int32)  # in [-2^31, 2^31)
    angle = torch.from_numpy(phase.astype(np.float32)) * (2 * np.pi / 2**32)
    return angle.cos(), angle.sin()


def _rotated(x: torch.Tensor, cos_sin: CosSin, spec: RotarySpec, factor: float = 1.0) -> torch.Tensor:
    """x [B, H, T, D] turned by cos, sin [T, R/2]; the dimensions that turn are multiplied by `factor`."""
    cos, sin = ((c * factor).to(x.dtype) for c in cos_sin)
    return rotate(x, cos, sin, spec)


def _logits(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q [B, Hq, T, D] . k [B, Hkv, n, D] -> [B, Hq, T, n]; each key head serves Hq / Hkv query heads in a row."""
    batch, num_q_heads, num_tokens, head_dim = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, head_dim)  # [B, Hkv, G * T, D]
    return (grouped @ k.mT).reshape(batch, num_q_heads, num_tokens, k.shape[2])


def _weighted(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """weights [B, Hq, T, n] . v [B, Hkv, n, D] -> [B, Hq, T, D]."""
    batch, num_q_heads, num_tokens, n = weights.shape
    grouped = weights.reshape(batch, v.shape[1], -1, n)  # [B, Hkv, G * T, n]
    return (grouped @ v).reshape(batch, num_q_heads, num_tokens, v.shape[3])
