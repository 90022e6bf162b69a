"""Findings of the probe about a model, and what they rule out of a config."""

from __future__ import annotations

import dataclasses
from typing import Any

from sinkrt.ring import Ring

from sinkexport.config import ExportConfig
from sinkexport.families.probe import probe_attention
from sinkexport.families.rope import ModelRotary
from sinkexport.families.shape import AttentionShape
from sinkexport.graph.plugin_nodes import refuse_geometry, refuse_no_attention
from sinkexport.model.experts import static_experts
from sinkexport.model.head_caches import HeadCache, head_caches
from sinkexport.pipeline.checks import (
    check_drafts,
    check_memory,
    check_rings,
    check_tuned_sinks,
    check_variant,
    check_weights_after_rotation,
)


@dataclasses.dataclass(frozen=True)
class Probed:
    """Findings of the probe about a model, and the caches that its heads get."""

    shape: AttentionShape
    rotary: ModelRotary
    caches: tuple[HeadCache, ...]

    @property
    def rings(self) -> list[Ring]:
        """Geometry of each cache."""
        return [cache.ring for cache in self.caches]


def probed_model(model: Any, config: ExportConfig) -> Probed:
    """Find out how a model attends, and what caches it gets.

    Raises: UsageError for a model that cannot be followed, and for one that the config does not fit.
    """
    with static_experts(model):  # transformers' own form has demands on sizes that the graph has not
        shape, rotary = probe_attention(model, model.config.get_text_config().num_hidden_layers, config.capacity)
    check_variant(model, config, shape)
    check_weights_after_rotation(config, rotary)
    probed = Probed(shape=shape, rotary=rotary, caches=head_caches(config, config.variant, shape))
    check_rings(config, probed.rings)
    check_drafts(config, shape, probed.rings)
    check_memory(config, probed.caches)
    if config.has_plugins:
        if not probed.caches:
            refuse_no_attention()
        for cache in probed.caches:
            refuse_geometry(cache.key_dim, config.batch, cache.ring.capacity)
    check_tuned_sinks(config, shape, probed.caches)
    return probed
