"""Tiny models with latent attention (MLA): arguments of their configurations, for `tests.exporter.tiny_models`."""

from __future__ import annotations

from typing import Any

from tests.exporter.tiny_common import GROUPED_EXPERTS, MLA, without

_MLA = {**MLA, "v_head_dim": 12, "pad_token_id": None}
_DEEPSEEK = {**_MLA, **GROUPED_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}

LATENT: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("DeepseekV2Config", {**_DEEPSEEK, "q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3Config", _DEEPSEEK),
    "deepseek_v3-yarn": (
        "DeepseekV3Config",
        {**_DEEPSEEK, "rope_parameters": _YARN, "rope_interleave": False, "attention_bias": True, "kv_lora_rank": 33},
    ),
    "minicpm3": ("MiniCPM3Config", {**_MLA, "v_head_dim": 8}),
    "glm4_moe_lite": (
        "Glm4MoeLiteConfig",
        {**_MLA, **GROUPED_EXPERTS, "n_routed_experts": 4, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "youtu": ("YoutuConfig", {**_MLA, "v_head_dim": 6}),
    "axk1": ("AXK1Config", _DEEPSEEK),
    "longcat_flash": (
        "LongcatFlashConfig",
        {
            **without(_MLA, "intermediate_size", "num_hidden_layers"),
            "num_layers": 1,
            "head_dim": 8,
            "ffn_hidden_size": 64,
            "expert_ffn_hidden_size": 32,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
        },
    ),
}
