"""Sinks + window in torch, a chunk of tokens at a time: what streaming token by token gives, many times faster.

For `eval --compare` and for tables over many S and W, which need no export. The model's own code runs; only its
rotation is replaced by one with exact phases, and its attention by one over sinks, window and chunk with a mask by
distance. It shares the exact phases with the exported graphs, and no more: how tokens are kept, masked and attended is
written here a second time, so that its agreement with a bundle says something about both.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sinkrt.errors import UsageError, problem

from sinkexport.config import ExportConfig
from sinkexport.families import refusal_of_capacity
from sinkexport.model.attention import stream_angles
from sinkexport.model.decoder import refuse_arguments
from sinkexport.model.interface import intercept_attention
from sinkexport.model.rope import (
    HandedOutRotary,
    ModelRotary,
    RotarySpec,
    find_rotary,
    lay_out,
    probe_attention,
    replaced_module,
)

CosSin = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, float32 [1, T, R/2] each."""


@contextlib.contextmanager
def chunked_streaming(
    model: Any,
    num_sink_tokens: int,
    window_size: int,
    kv: str = "fp",
    first_token_scale: Sequence[Sequence[float]] | None = None,
) -> Iterator[ChunkedStream]:
    """Make `model` stream with S = num_sink_tokens >= 0 and W = window_size >= 1 for the length of a context.

    kv: ``fp``, or ``int8``: the window's keys and values are rounded to INT8 as they come, those of sinks are not.
    first_token_scale: [L][Hq], factors on the attention weight of token 0 (ZeroTuning, arXiv:2505.11739); needs S >= 1.

    The model, in evaluation mode, is changed inside and left as it was, also after an exception.

    Raises: UsageError for a bad geometry and for a model whose attention or positions cannot be followed exactly.
    """
    config = ExportConfig(num_sink_tokens, window_size, chunk_size=1, kv=kv)
    if limit := refusal_of_capacity(model.config, config.capacity):
        raise UsageError(problem("sinks + window", received=f"{config.capacity} tokens", expected=limit,
                                 fix="use a smaller window"))  # fmt: skip
    _, rotary = probe_attention(model, model.config.get_text_config().num_hidden_layers)
    stream = ChunkedStream(model, config, rotary, first_token_scale)
    name, _ = find_rotary(model)
    ones = lay_out(torch.ones(1, 1, rotary.frequency.numel(), dtype=next(model.parameters()).dtype), rotary.cos_layout)
    identity = HandedOutRotary(ones, torch.zeros_like(ones))  # x * 1 + rotate_half(x) * 0 is x exactly
    with intercept_attention(model, stream.attend), replaced_module(model, name, identity):
        yield stream


@dataclasses.dataclass(frozen=True)
class _Kept:
    """What one layer carries from chunk to chunk, keys rotated at their stream positions.

    sink_k, sink_v: [B, Hkv, n <= S, D]. window_k, window_v: [B, Hkv, n <= W - 1, D], oldest first.
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
        rotary: ModelRotary,
        first_token_scale: Sequence[Sequence[float]] | None = None,
    ) -> None:
        self._model = model
        self._config = config
        self._rotary = rotary
        self._scale = None if first_token_scale is None else torch.tensor(first_token_scale).log()  # [L, Hq]
        self._kept: dict[int, _Kept] = {}  # by layer
        self._position = 0  # of the chunk's first token
        # Of the chunk that runs, the same in all layers: [T, sinks + window tokens], True where a token is seen.
        self._sees = torch.ones(0, 0, dtype=torch.bool)
        self._turn: CosSin  # of each token to its stream position
        self._shift: CosSin  # by which the query is turned back for the sinks

    @property
    def position(self) -> int:
        """Tokens fed to each stream so far."""
        return self._position

    def feed(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed T >= 1 tokens to each stream, T as it likes in every call. ids: int64 [B, T].

        Returns: logits [B, T, vocab] after each token, in the model's dtype.
        """
        num_tokens = ids.shape[1]
        start = torch.tensor([self._position])
        frequency = self._rotary.frequency
        self._turn = stream_angles(start, frequency, num_tokens, 0)
        self._shift = stream_angles(start, frequency, num_tokens, self._config.capacity - 1)
        self._sees = visible(self._config, self._position, num_tokens)
        with torch.no_grad():
            # Positions reach nothing but the rotary embedding, which is replaced.
            output = self._model(input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False)
        self._position += num_tokens
        logits: torch.Tensor = output.logits
        return logits

    def reset(self) -> None:
        """Forget all tokens."""
        self._kept.clear()
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
        sliding_window: int | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' attention interface. q: [B, Hq, T, D], k and v: [B, Hkv, T, D] -> [B, T, Hq, D]."""
        layer = int(module.layer_idx)
        refuse_arguments(layer, self._config, sliding_window, others)
        spec, factor = self._rotary.layers[layer], self._rotary.scaling
        q, k = (_rotated(x, self._turn, spec, factor) for x in (q, k))
        q = q * (scaling if scaling is not None else q.shape[-1] ** -0.5)  # here: logits are many more
        seen = self._with_chunk(layer, k, v)
        back = (self._shift[0], -self._shift[1])
        logits = torch.cat(
            (_products(_rotated(q, back, spec), seen.sink_k), _products(q, seen.window_k)), dim=-1
        )  # [B, Hq, T, n]
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        if self._scale is not None:
            logits[..., 0] += self._scale[layer][:, None].to(logits.dtype)  # the first of the sinks is token 0
        weights = logits.float().masked_fill_(~self._sees, float("-inf")).softmax(dim=-1).to(v.dtype)
        out = _weighted(weights, torch.cat((seen.sink_v, seen.window_v), dim=2))  # [B, Hq, T, D]
        self._keep(layer, seen)
        return out.transpose(1, 2), None

    def _with_chunk(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> _Kept:
        """What the layer keeps and the chunk's tokens, k and v [B, Hkv, T, D], sorted into sinks and window."""
        none = k[:, :, :0]
        kept = self._kept.get(layer, _Kept(none, none, none, none))
        sinks = max(0, self._config.num_sink_tokens - self._position)  # leading tokens of the chunk that are sinks
        return _Kept(
            torch.cat((kept.sink_k, k[:, :, :sinks]), dim=2),
            torch.cat((kept.sink_v, v[:, :, :sinks]), dim=2),
            torch.cat((kept.window_k, self._as_stored(k[:, :, sinks:])), dim=2),
            torch.cat((kept.window_v, self._as_stored(v[:, :, sinks:])), dim=2),
        )

    def _as_stored(self, rows: torch.Tensor) -> torch.Tensor:
        """Keys or values [B, Hkv, n, D] as the window holds them: here in floating point, rounded if it is INT8."""
        if not self._config.has_int8_window:
            return rows
        x = rows.float()
        scale = (x.abs().amax(dim=-1, keepdim=True) / 127).clamp(2.0**-17, 65504.0).half().float()
        return (torch.clamp((x / scale).round(), -127, 127) * scale).to(rows.dtype)

    def _keep(self, layer: int, seen: _Kept) -> None:
        """Of the window the last W - 1 tokens: with itself, the next token has W."""
        first = max(0, seen.window_k.shape[2] - (self._config.window_size - 1))
        # clone: a slice would hold on to the memory of all that it was cut from
        self._kept[layer] = _Kept(
            seen.sink_k, seen.sink_v, seen.window_k[:, :, first:].clone(), seen.window_v[:, :, first:].clone()
        )


def visible(config: ExportConfig, position: int, num_tokens: int) -> torch.Tensor:
    """Which kept tokens each token of a chunk sees: bool [T, n], n the sinks there are, then the window's tokens.

    position: of the chunk's first token. The window's columns begin with the oldest token that this one sees, and end
    with the chunk's last.
    """
    num_sinks, window_size = config.num_sink_tokens, config.window_size
    end = position + num_tokens
    query = torch.arange(position, end)[:, None]  # [T, 1]
    sinks = torch.arange(min(num_sinks, end))
    first = max(num_sinks, position - window_size + 1)
    window = torch.arange(first, max(first, end))  # none while all tokens are sinks
    return torch.cat((sinks <= query, (window <= query) & (query - window < window_size)), dim=1)


def _rotated(x: torch.Tensor, cos_sin: CosSin, spec: RotarySpec, factor: float = 1.0) -> torch.Tensor:
    """x [B, H, T, D] turned by cos, sin [1, T, R/2]; the dimensions that turn are multiplied by `factor`."""
    if not spec.rotary_dim:
        return x
    cos, sin = ((c * factor).to(x.dtype).expand(x.shape[0], -1, -1) for c in cos_sin)  # [B, T, R/2]
    partial = spec.rotary_dim if spec.rotary_dim < x.shape[-1] else 0  # 0: all of the head
    turned: torch.Tensor = torch.onnx.ops.rotary_embedding(
        x, cos, sin, interleaved=spec.interleaved, rotary_embedding_dim=partial
    )
    return turned


def _products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q [B, Hq, T, D] . k [B, Hkv, n, D] -> [B, Hq, T, n]; each key head serves Hq / Hkv query heads in a row."""
    batch, num_q_heads, num_tokens, head_dim = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, head_dim)  # [B, Hkv, G * T, D]
    return (grouped @ k.mT).reshape(batch, num_q_heads, num_tokens, k.shape[2])


def _weighted(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """weights [B, Hq, T, n] . v [B, Hkv, n, D] -> [B, Hq, T, D]."""
    batch, num_q_heads, num_tokens, n = weights.shape
    grouped = weights.reshape(batch, v.shape[1], -1, n)  # [B, Hkv, G * T, n]
    return (grouped @ v).reshape(batch, num_q_heads, num_tokens, v.shape[3])
