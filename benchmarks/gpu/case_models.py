"""Models of `cases.py`: two or three layers with random weights that float16 holds, one thing in each that differs."""

from __future__ import annotations

from typing import Any

_TWO_LAYERS: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": False,
}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
"""Token ids that small vocabularies have; no row of an embedding is left out."""

_LINEAR_AND_FULL = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
_FULL_AND_SLIDING = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 24}
_FOUR_SHARED = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 24,
    "hidden_size_per_layer_input": 16,
}
_EXPERTS = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}
# Queries and keys have 48 dimensions that do not turn and 16 that do: heads of 64.
_LATENT = {
    **{key: value for key, value in _TWO_LAYERS.items() if key != "head_dim"},
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8, "mamba_n_groups": 2}

# What attention has besides, in models that have it: ALiBi; learned sink logits, in a layer with a window of its own as
# well; output gates; heads that differ from layer to layer; caches that layers share. What models have besides:
# experts, recurrent layers.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("BloomConfig", {"hidden_size": 256, "n_layer": 2, "n_head": 4}),
    "flint": ("FlintConfig", {**_TWO_LAYERS, **_FULL_AND_SLIDING, "mlp_only_layers": [0, 1]}),
    "qwen3_5": ("Qwen3_5TextConfig", {**_TWO_LAYERS, "layer_types": ["full_attention"] * 2}),
    "qwen3_5_linear": ("Qwen3_5TextConfig", {**_TWO_LAYERS, **_LINEAR_AND_FULL}),
    "mixtral": ("MixtralConfig", {**_TWO_LAYERS, "num_local_experts": 12, "num_experts_per_tok": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            **_TWO_LAYERS,
            "moe_intermediate_size": 64,
            "num_experts": 12,
            "num_experts_per_tok": 4,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **_TWO_LAYERS,
            **_LINEAR_AND_FULL,
            "num_experts": 12,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "laguna": (
        "LagunaConfig",
        {
            **_TWO_LAYERS,
            **_FULL_AND_SLIDING,
            "num_attention_heads_per_layer": [4, 6],
            "mlp_layer_types": ["dense", "dense"],
        },
    ),
    "mimo_v2_flash": (
        "MiMoV2FlashConfig",
        {
            **_TWO_LAYERS,
            **_FULL_AND_SLIDING,
            "head_dim": 96,
            "v_head_dim": 64,
            "mlp_layer_types": ["dense", "dense"],
        },
    ),
    "gemma3n": (
        "Gemma3nTextConfig",
        {
            **_TWO_LAYERS,
            **_FOUR_SHARED,
            "intermediate_size": [256] * 4,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
            "altup_num_inputs": 2,
        },
    ),
    "gemma4": ("Gemma4TextConfig", {**_TWO_LAYERS, **_FOUR_SHARED, "global_head_dim": 128, "attention_k_eq_v": True}),
    "diffllama": ("DiffLlamaConfig", _TWO_LAYERS),
    "minicpm3": ("MiniCPM3Config", _LATENT),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_LATENT,
            **_EXPERTS,
            "n_group": 1,
            "topk_group": 1,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "lfm2": (
        "Lfm2Config",
        {**_TWO_LAYERS, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "falcon_h1": ("FalconH1Config", {**_TWO_LAYERS, **_MAMBA2, "mamba_d_ssm": 128, "key_multiplier": 0.7}),
    "nemotron_h": (
        "NemotronHConfig",
        {
            **{key: value for key, value in _TWO_LAYERS.items() if key != "num_hidden_layers"},
            "layers_block_type": ["linear_attention", "full_attention", "mlp"],
            "ssm_state_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 8,
        },
    ),
    "jamba": (
        "JambaConfig",
        {
            **_TWO_LAYERS,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
    ),
    "olmo_hybrid": (
        "OlmoHybridConfig",
        {**_TWO_LAYERS, **_LINEAR_AND_FULL, "num_key_value_heads": 4, "linear_num_key_heads": 4},
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {
            **_TWO_LAYERS,
            "num_key_value_heads": 1,
            "lru_width": 128,
            "attention_window_size": 128,
            "block_types": ["recurrent", "attention"],
            "logits_soft_cap": 5.0,
        },
    ),
    "minimax": (
        "MiniMaxConfig",
        {
            **_TWO_LAYERS,
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "block_size": 8,
        },
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        {
            **_LATENT,
            "q_lora_rank": None,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "dense"],
            "num_experts": 4,
            "linear_head_dim": 32,
            "linear_num_heads": 4,
        },
    ),
    "zaya": (
        "ZayaConfig",
        {
            **{key: value for key, value in _TWO_LAYERS.items() if key != "intermediate_size"},
            **_EXPERTS,
            "num_experts_per_tok": 1,
            "num_experts": 4,
            "router_hidden_size": 16,
            "layer_types": ["hybrid", "hybrid_sliding"],
            "sliding_window": 24,
        },
    ),
}

_RATES = ("A_log", "dt_bias", "dt_proj.bias", "recurrent_param")
"""Parameters that say how fast a recurrent state forgets: random ones forget all, or grow."""


def case_model(family: str, vocab_size: int, head_dim: int, *, has_sink_scale: bool) -> Any:
    """A model in float32, of weights that float16 holds.

    head_dim: a Llama's; other families have their own. has_sink_scale: its heads will have factors on token 0.
    """
    import torch
    import transformers
    from sinkexport.model.moe_layers import routers

    if family == "llama":
        arguments = {**_TWO_LAYERS, "num_hidden_layers": 3, "head_dim": head_dim}
        config = transformers.LlamaConfig(vocab_size=vocab_size, **arguments)
    else:
        config_class, arguments = FAMILIES[family]
        if family in ("gemma3n", "gemma4"):
            arguments = {**arguments, "vocab_size_per_layer_input": vocab_size}
        config = getattr(transformers, config_class)(vocab_size=vocab_size, **_TOKENS, **arguments)
    model = transformers.AutoModelForCausalLM.from_config(config)
    if family != "llama" or has_sink_scale:
        # Weights of a new model make attention so even that what it has besides would not matter.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(_RATES):
                    continue
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.5 if parameter.dim() == 3 and "conv" in name else 0.05)
                elif name.endswith("sinks"):  # about as heavy as all that a window holds
                    parameter.normal_(4.0, 1.0)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
            for name in sorted(routers(model)):  # so that a choice which rounding tips is of experts that count little
                model.get_parameter(f"{name}.weight").normal_(0.0, 1.0)
    return model.to(torch.float16).to(torch.float32).eval()
