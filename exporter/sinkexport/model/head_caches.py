"""Which heads of which layers share a cache of one geometry: whole layers, unless heads have budgets of their own."""

from __future__ import annotations

import dataclasses

from sinkrt.ring import Ring

from sinkexport.config import ExportConfig
from sinkexport.model.rope import AttentionShape
from sinkexport.variants.head_windows import head_groups


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
        """Of the graph's input."""
        return f"{kind}.{self.layer}" if self.is_whole else f"{kind}.{self.layer}.{self.group}"


def head_caches(config: ExportConfig, shape: AttentionShape) -> tuple[HeadCache, ...]:
    """All caches, layer by layer, those of a layer with the longest window first."""
    size = shape.num_q_heads // shape.num_kv_heads  # query heads of a key head
    caches = []
    for layer, own_window in enumerate(shape.own_windows):
        if layer in shape.recurrent:  # linear attention: no cache
            continue
        budgets = config.budgets
        windows = (config.window_size,) * shape.num_kv_heads if budgets is None else budgets.windows[layer]
        groups = head_groups(layer, [config.ring(own_window, window).window_size for window in windows])
        for number, group in enumerate(groups):
            heads = group.kv_heads
            q_heads = tuple(head * size + i for head in heads for i in range(size))
            window = windows[heads[0]]
            caches.append(HeadCache(layer, number, heads, q_heads, config.ring(own_window, window), len(groups) == 1))
    return tuple(caches)
