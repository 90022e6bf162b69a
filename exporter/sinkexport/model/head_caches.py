"""Heads that share a cache of one geometry: whole layers, unless there are per-head windows."""

from __future__ import annotations

import dataclasses

from sinkrt.ring import Ring

from sinkexport.config import ExportConfig
from sinkexport.families.rope import AttentionShape
from sinkexport.variants.head_windows import head_groups
from sinkexport.variants.variant import AttentionVariant


@dataclasses.dataclass(frozen=True)
class HeadCache:
    """A cache of some key heads of a layer.

    group: its number in the layer. kv_heads: their indices, ascending. q_heads: of the query heads that they serve.
    is_whole: whether these are all heads of the layer.
    """

    layer: int
    group: int
    kv_heads: tuple[int, ...]
    q_heads: tuple[int, ...]
    ring: Ring
    is_whole: bool

    def state_name(self, kind: str) -> str:
        """Name of the graph's input."""
        return f"{kind}.{self.layer}" if self.is_whole else f"{kind}.{self.layer}.{self.group}"


def head_caches(config: ExportConfig, variant: AttentionVariant, shape: AttentionShape) -> tuple[HeadCache, ...]:
    """All caches, layer by layer, those of a layer with the longest window first."""
    size = shape.num_q_heads // shape.num_kv_heads  # query heads of a key head
    caches = []
    for layer, sliding_window in enumerate(shape.sliding_windows):
        if layer in shape.recurrent:  # linear attention: no cache
            continue
        windows = variant.windows(layer, shape.num_kv_heads, config.window_size)
        groups = head_groups(layer, [config.ring(sliding_window, window).window_size for window in windows])
        for number, group in enumerate(groups):
            heads = group.kv_heads
            q_heads = tuple(head * size + i for head in heads for i in range(size))
            window = windows[heads[0]]
            caches.append(
                HeadCache(
                    layer=layer,
                    group=number,
                    kv_heads=heads,
                    q_heads=q_heads,
                    ring=config.ring(sliding_window, window),
                    is_whole=len(groups) == 1,
                )
            )
    return tuple(caches)
