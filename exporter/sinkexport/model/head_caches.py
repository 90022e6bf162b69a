"""Heads that share a cache of one geometry: all of an attention call, unless there are per-head windows."""

from __future__ import annotations

import dataclasses

from sinkrt.ring import Ring

from sinkexport.config import ExportConfig
from sinkexport.families.shape import AttentionCall, AttentionShape
from sinkexport.variants.head_windows import head_groups
from sinkexport.variants.variant import AttentionVariant


@dataclasses.dataclass(frozen=True)
class HeadCache:
    """A cache of some key heads of one attention call.

    call: index of the call whose keys and values it keeps. number: of that call in its layer.
    group: its number in the call. kv_heads: their indices, ascending. q_heads: of the query heads that they serve.
    is_whole: whether these are all heads of the call.
    key_dim, value_dim: elements of a row of keys and of values.
    is_latent: whether values are the last elements of the keys' rows, which alone are kept (model/latent.py).
    """

    layer: int
    call: int
    number: int
    group: int
    kv_heads: tuple[int, ...]
    q_heads: tuple[int, ...]
    ring: Ring
    is_whole: bool
    key_dim: int
    value_dim: int
    is_latent: bool = False

    @property
    def num_elements(self) -> int:
        """Elements that are kept of a token and key head."""
        return self.key_dim if self.is_latent else self.key_dim + self.value_dim

    def state_name(self, kind: str) -> str:
        """Name of the graph's input."""
        parts = [f"{kind}.{self.layer}"]
        parts += [f"call{self.number}"] if self.number else []
        parts += [] if self.is_whole else [str(self.group)]
        return ".".join(parts)


def head_caches(config: ExportConfig, variant: AttentionVariant, shape: AttentionShape) -> tuple[HeadCache, ...]:
    """All caches, in the order of their calls, those of a call with the longest window first."""
    return tuple(
        cache
        for index, call in enumerate(shape.calls)
        if cache_owner(config, shape, index) == index
        for cache in _caches_of(config, variant, index, call)
    )


def cache_owner(config: ExportConfig, shape: AttentionShape, call: int) -> int:
    """Index of the call whose cache a call reads: its own, or that of the call whose keys and values it shares.

    The plugin writes what it attends to: there every call has a cache of its own. So it is where heads or layers of an
    attention variant may keep different windows.
    """
    shares = shape.calls[call].shares
    return call if shares is None or config.has_plugins or not config.variant.is_plain else shares


def _caches_of(
    config: ExportConfig, variant: AttentionVariant, index: int, call: AttentionCall
) -> tuple[HeadCache, ...]:
    latent, num_kv_heads = call.latent, call.num_kv_heads
    key_dim, value_dim = call.key_dim, call.value_dim
    # The plugin has two caches, and no kernel for rows of this length: there keys and values are expanded.
    is_latent = latent is not None and latent.is_worth_it and not config.has_plugins
    if latent is not None and is_latent:
        num_kv_heads, key_dim, value_dim = 1, latent.row_dim, latent.latent_dim
    if config.has_plugins:  # its rows of keys and values are of one size
        key_dim = value_dim = max(key_dim, value_dim)
    all_heads = tuple(range(call.num_q_heads))
    windows = variant.windows(call.layer, num_kv_heads, config.window_size)
    groups = head_groups(call.layer, [config.ring(call.sliding_window, window).window_size for window in windows])
    return tuple(
        HeadCache(
            layer=call.layer,
            call=index,
            number=call.number,
            group=number,
            kv_heads=group.kv_heads,
            q_heads=all_heads if is_latent else tuple(q for head in group.kv_heads for q in call.query_heads(head)),
            ring=config.ring(call.sliding_window, windows[group.kv_heads[0]]),
            is_whole=len(groups) == 1,
            key_dim=key_dim,
            value_dim=value_dim,
            is_latent=is_latent,
        )
        for number, group in enumerate(groups)
    )
