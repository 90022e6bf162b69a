"""What streaming by chunks carries from chunk to chunk: each cache's tokens, and the attention that they received."""

from __future__ import annotations

import dataclasses

import torch
from sinkrt.contract import ActTuning
from sinkrt.ring import Ring

from sinkexport.config import ExportConfig
from sinkexport.families.shape import AttentionShape
from sinkexport.reference.chunk_attention import Entries
from sinkexport.variants.variant import AttentionVariant

TINY = 1e-30
"""Lower bound of a sum of weights that divides."""


@dataclasses.dataclass(frozen=True)
class CacheHeads:
    """Heads of one attention call whose caches have one geometry. kv_heads, q_heads: their indices in the call."""

    call: int
    layer: int
    kv_heads: tuple[int, ...]
    q_heads: tuple[int, ...]
    ring: Ring


def heads_by_cache(config: ExportConfig, variant: AttentionVariant, shape: AttentionShape) -> tuple[CacheHeads, ...]:
    """The heads of all attention calls, by cache."""
    found = []
    for index, call in enumerate(shape.calls):
        windows = variant.windows(call.layer, call.num_kv_heads, config.window_size)
        rings = [config.ring(call.sliding_window, window) for window in windows]
        for ring in dict.fromkeys(rings):
            kv_heads = tuple(head for head, own in enumerate(rings) if own == ring)
            q_heads = tuple(q for head in kv_heads for q in call.query_heads(head))
            found.append(CacheHeads(call=index, layer=call.layer, kv_heads=kv_heads, q_heads=q_heads, ring=ring))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class KeptRows:
    """Rows that the heads of one cache carry from chunk to chunk, keys rotated at their stream positions.

    sink_k, sink_v: [B, Hkv, n <= S, D and Dv]. window_k, window_v: [B, Hkv, n <= W - 1, D and Dv], oldest first.
    """

    sink_k: torch.Tensor
    sink_v: torch.Tensor
    window_k: torch.Tensor
    window_v: torch.Tensor


class KeptTokens:
    """Caches of all attention calls, by their heads."""

    def __init__(self, config: ExportConfig) -> None:
        self._is_int8 = config.has_int8_window
        self.rows: dict[CacheHeads, KeptRows] = {}
        self._received: dict[CacheHeads, torch.Tensor] = {}  # [B, Hq, n], by the tokens in `rows`' window

    def clear(self) -> None:
        """Forget all tokens."""
        self.rows.clear()
        self._received.clear()

    def calibrated(
        self, act: ActTuning, cache: CacheHeads, weights: torch.Tensor, entries: Entries, position: int
    ) -> torch.Tensor:
        """weights [B, Hq, T, n], float32, with later sinks scaled down in the heads of `act`.

        position: of the chunk's first token.
        """
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
        query = torch.arange(position, position + num_tokens)[:, None]
        queries = (query - entries.window + 1).clamp(min=1)  # [T, w]
        share = (query + 1).clamp(max=ring.capacity) / queries / act.alpha
        degree = (received * share - 1).clamp(0, 1) * (queries >= act.min_queries) * heads[:, None, None]
        taken = degree * window
        rest = torch.cat((weights[..., :sinks], window - taken), dim=-1)
        freed = (1 - act.beta) * taken.sum(dim=-1, keepdim=True)
        calibrated = rest * (1 + freed / rest.sum(dim=-1, keepdim=True).clamp(min=TINY))
        calibrated[..., sinks:] += act.beta * taken
        return calibrated

    def with_chunk(self, cache: CacheHeads, k: torch.Tensor, v: torch.Tensor, position: int) -> KeptRows:
        """Rows that are kept and those of the chunk, k and v [B, Hkv, T, D], sorted into sinks and window."""
        no_k, no_v = k[:, :, :0], v[:, :, :0]
        kept = self.rows.get(cache, KeptRows(sink_k=no_k, sink_v=no_v, window_k=no_k, window_v=no_v))
        sinks = max(0, cache.ring.num_sink_tokens - position)  # leading tokens of the chunk
        return KeptRows(
            sink_k=torch.cat((kept.sink_k, k[:, :, :sinks]), dim=2),
            sink_v=torch.cat((kept.sink_v, v[:, :, :sinks]), dim=2),
            window_k=torch.cat((kept.window_k, self._as_stored(k[:, :, sinks:])), dim=2),
            window_v=torch.cat((kept.window_v, self._as_stored(v[:, :, sinks:])), dim=2),
        )

    def _as_stored(self, rows: torch.Tensor) -> torch.Tensor:
        """Keys or values [B, Hkv, n, D] as the window holds them: here in floating point, rounded if it is INT8."""
        if not self._is_int8:
            return rows
        x = rows.float()
        scale = (x.abs().amax(dim=-1, keepdim=True) / 127).clamp(2.0**-17, 65504.0).half().float()
        return (torch.clamp((x / scale).round(), -127, 127) * scale).to(rows.dtype)

    def keep(self, cache: CacheHeads, seen: KeptRows) -> None:
        """Keep the last W - 1 tokens of the window: with itself, the next token has W."""
        first = max(0, seen.window_k.shape[2] - (cache.ring.window_size - 1))
        # clone: a slice would hold on to the memory of all that it was cut from
        self.rows[cache] = KeptRows(
            sink_k=seen.sink_k,
            sink_v=seen.sink_v,
            window_k=seen.window_k[:, :, first:].clone(),
            window_v=seen.window_v[:, :, first:].clone(),
        )
