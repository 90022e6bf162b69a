"""Arguments that most configurations of tiny models have."""

from __future__ import annotations

from typing import Any

from tests.support import VOCAB_SIZE

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

MLA: dict[str, Any] = {
    **COMMON,
    "num_key_value_heads": 6,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
}
"""Sizes of latent attention besides."""

EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
GROUPED_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 32,
    "n_group": 1,
    "num_experts_per_tok": 2,
    "topk_group": 1,
}
"""DeepSeek's experts, in one group."""

SHARED_EXPERT: dict[str, Any] = {
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 32,
}

DELTA_RULE: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 8,
}


def without(arguments: dict[str, Any], *names: str) -> dict[str, Any]:
    """The others of these arguments."""
    return {name: value for name, value in arguments.items() if name not in names}
