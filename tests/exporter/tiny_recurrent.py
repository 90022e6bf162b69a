"""Tiny models with recurrent layers: arguments of their configurations, for `tests.exporter.tiny_models`."""

from __future__ import annotations

from typing import Any

from tests.exporter.tiny_common import COMMON, DELTA_RULE, EXPERTS, SHARED_EXPERT, without

_MAMBA2 = {"mamba_n_heads": 12, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 8, "mamba_n_groups": 2}
_NO_ATTENTION = {"vocab_size": 97, "hidden_size": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_MAMBA1 = {"mamba_d_state": 8, "mamba_dt_rank": 4}

_KIMI = {
    **without(COMMON, "num_key_value_heads"),
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_experts": 8,
    "num_experts_per_token": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
}
"""Arguments of families with Kimi delta attention beside latent attention."""

RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": (
        "Lfm2Config",
        {
            **COMMON,
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {
            **COMMON,
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "conv"],
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_dense_layers": 1,
            "conv_L_cache": 4,
        },
    ),
    "lfm3": (
        "Lfm3Config",
        {
            **COMMON,
            "num_hidden_layers": 3,
            "head_dim": 8,
            "layer_types": ["conv", "sliding_attention", "full_attention"],
            "sliding_window": 7,
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            **without(COMMON, "num_hidden_layers"),
            "head_dim": 8,
            "layers_block_type": ["linear_attention", "full_attention", "mlp"],
            "ssm_state_size": 16,
            "mamba_num_heads": 12,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "chunk_size": 8,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **COMMON,
            **_MAMBA2,
            "num_hidden_layers": 3,
            "attention_multiplier": 0.3,
            "num_local_experts": 4,
            "shared_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "bamba": (
        "BambaConfig",
        {**COMMON, **_MAMBA2, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    ),
    "falcon_h1": (
        "FalconH1Config",
        {**COMMON, **_MAMBA2, "head_dim": 8, "mamba_d_ssm": 96, "key_multiplier": 0.7},
    ),
    "zamba2": (
        "Zamba2Config",
        {
            **COMMON,
            "num_hidden_layers": 4,
            "num_key_value_heads": 6,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "mamba_d_state": 16,
            "mamba_headdim": 8,
            "n_mamba_heads": 12,
            "mamba_ngroups": 2,
            "chunk_size": 8,
            "num_mem_blocks": 1,
            "use_mem_rope": True,
            "use_shared_attention_adapter": True,
            "adapter_rank": 4,
        },
    ),
    "mamba2": (
        "Mamba2Config",
        {
            **_NO_ATTENTION,
            "num_heads": 12,
            "head_dim": 8,
            "state_size": 16,
            "num_hidden_layers": 2,
            "n_groups": 2,
            "chunk_size": 8,
        },
    ),
    "jamba": (
        "JambaConfig",
        {
            **COMMON,
            **_MAMBA1,
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
    ),
    "zamba": (
        "ZambaConfig",
        {
            **COMMON,
            **_MAMBA1,
            "num_hidden_layers": 4,
            "num_key_value_heads": 6,
            "attention_hidden_size": 96,
            "attention_head_dim": 16,
            "n_mamba_heads": 2,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        },
    ),
    "mamba": ("MambaConfig", {**_NO_ATTENTION, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4}),
    "falcon_mamba": (
        "FalconMambaConfig",
        {**_NO_ATTENTION, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4},
    ),
    "olmo_hybrid": (
        "OlmoHybridConfig",
        {
            **COMMON,
            "num_key_value_heads": 6,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 4,
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 8,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {
            **COMMON,
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
            "head_dim": 16,
            "lru_width": 48,
            "attention_window_size": 64,
            "block_types": ["recurrent", "attention"],
            "logits_soft_cap": 5.0,
        },
    ),
    "minimax": (
        "MiniMaxConfig",
        {
            **COMMON,
            "head_dim": 8,
            **EXPERTS,
            "block_size": 8,
            "linear_attn_alpha_factor": 1.5,
            "mlp_beta_factor": 0.5,
        },
    ),
    "kimi_linear": ("KimiLinearConfig", {**_KIMI, "linear_head_dim": 8, "linear_num_heads": 4}),
    "bailing_hybrid": (
        "BailingHybridConfig",
        {**_KIMI, "head_dim": 8, "num_expert_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "rwkv": ("RwkvConfig", {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "rescale_every": 2}),
    # Sizes that transformers' own cache has, too: multiples of 64.
    "xlstm": (
        "xLSTMConfig",
        {
            "vocab_size": 97,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "chunk_size": 8,
            "qk_dim_factor": 0.5,
            "v_dim_factor": 1.0,
            "ffn_proj_factor": 0.5,
        },
    ),
    "qwen4_exp_text": (
        "Qwen4ExpTextConfig",
        {
            **without(COMMON, "intermediate_size"),
            "head_dim": 8,
            "layer_types": ["linear_attention", "indexed_attention"],
            **DELTA_RULE,
            **SHARED_EXPERT,
            "hc_count": 2,
            "hc_lowrank": 8,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 256,
            "indexer_compress_ratio": 4,
        },
    ),
    "zaya": (
        "ZayaConfig",
        {
            **without(COMMON, "intermediate_size"),
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
            "router_hidden_size": 16,
            "sliding_window": 7,
            "layer_types": ["hybrid", "hybrid_sliding"],
        },
    ),
}
