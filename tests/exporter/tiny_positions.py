"""Tiny models whose positions are elsewhere than in a plain rotation, for `tests.exporter.tiny_models`."""

from __future__ import annotations

from typing import Any

from tests.exporter.tiny_common import COMMON, EXPERTS

POSITIONED: dict[str, tuple[str, dict[str, Any]]] = {
    "nanochat": ("NanoChatConfig", COMMON),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", {**COMMON, "head_dim": 16}),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1Config",
        {**COMMON, "head_dim": 8, "num_experts": 4, "moe_topk": 2, "moe_intermediate_size": 32},
    ),
    "ministral3": (
        "Ministral3Config",
        {
            **COMMON,
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 4,  # the scale changes at each multiple
                "llama_4_scaling_beta": 0.4,
            },
        },
    ),
    "llama4_text": (
        "Llama4TextConfig",
        {
            **COMMON,
            "head_dim": 8,
            "intermediate_size_mlp": 64,
            "num_local_experts": 4,
            "moe_layers": [1],
            "attention_chunk_size": 12,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "use_qk_norm": True,
            "attn_temperature_tuning": True,
            "floor_scale": 2,  # the temperature changes at each multiple
            "attn_scale": 0.3,
        },
    ),
    "granite_swa": (
        "GraniteSWAConfig",
        {
            **COMMON,
            "num_hidden_layers": 3,
            "attention_multiplier": 0.3,
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "layer_rope_theta": [10000.0, 500.0, 0],
        },
    ),
    "granitemoe_swa": (
        "GraniteMoeSWAConfig",
        {
            **COMMON,
            **EXPERTS,
            "attention_multiplier": 0.3,
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention"],
            "layer_rope_theta": [500.0, 10000.0],
        },
    ),
    "moshi": ("MoshiConfig", {**COMMON, "head_dim": 8, "ffn_dim": 64, "sliding_window": 64}),
}
