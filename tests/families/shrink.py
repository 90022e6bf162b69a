"""The smallest sensible configuration of any causal LM of the installed transformers, made from its defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

OVERRIDES = json.loads(Path(__file__).with_name("overrides.json").read_text(encoding="utf-8"))
"""Corrections by model type: ``fields`` for the automatic ones, arguments of the ``defaults`` that they are made
from, or the reason why it is ``not_built``."""

HIDDEN, HEADS, HEAD = 48, 6, 8

SIZE_OF: dict[int, str] = {
    512: """
        max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions
        max_source_positions context_length
    """,
    97: """
        vocab_size unpadded_vocab_size vocab_size_per_layer_input decoder_vocab_size
    """,
    64: """
        intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dim_ff dff d_inner
        feed_forward_size shared_intermediate_size intermediate_size_mlp
    """,
    HIDDEN: """
        hidden_size d_model n_embd dim word_embed_proj_dim emb_dim embedding_dim embedding_size
        input_embedding_size output_embedding_size lru_width attention_hidden_size backbone_hidden_size
    """,
    32: """
        moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size
        shared_experts_intermediate_size dense_intermediate_size moe_shared_expert_intermediate_size
        router_hidden_size
    """,
    24: """
        q_lora_rank o_lora_rank
    """,
    16: """
        qk_head_dim kv_lora_rank
    """,
    12: """
        mamba_n_heads mamba_num_heads
    """,
    8: """
        head_dim swa_head_dim kv_channels d_head attention_head_size dim_head qk_rope_head_dim qk_nope_head_dim
        v_head_dim global_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim
        swa_v_head_dim gated_norm_rank laurel_rank adapter_rank hidden_size_per_layer_input d_rel mamba_d_state
        ssm_state_size state_size mamba_d_head mamba_head_dim mamba_chunk_size chunk_size block_multiple_of
        ffn_round_up_to_multiple_of
    """,
    7: """
        sliding_window sliding_window_size attention_window_size local_attention window_size
    """,
    HEADS: """
        num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
        encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads
        linear_num_heads
    """,
    4: """
        linear_num_value_heads num_experts num_local_experts n_routed_experts moe_num_experts time_step_rank
        mamba_dt_rank rotary_dim
    """,
    2: """
        num_key_value_heads num_kv_heads swa_num_key_value_heads kv_n_heads num_global_key_value_heads
        linear_num_key_heads n_mamba_heads num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k
        top_k_experts zero_expert_num index_n_heads o_groups hc_mult mamba_n_groups n_groups mamba_ngroups
    """,
    1: """
        n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts
    """,
}
"""Names of the fields that get a size, where the defaults have the field and its default is no less."""

SIZES = {name: size for size, names in SIZE_OF.items() for name in names.split()}
VOCAB_SIZE = SIZES["vocab_size"]

DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
)
OTHER_DEPTHS = ("encoder_layers", "num_encoder_layers")
LEFT_OUT = ("per_layer_config",)
"""Fields that a configuration makes of others."""

MAX_LAYERS = 4
MAX_PARAMETERS = 4_000_000


def model_types() -> list[str]:
    """The model types of all causal LMs of the installed transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> Any:
    """The configuration of a tiny model of this type. Raises: whatever its class raises, if there is none."""
    override = OVERRIDES.get(model_type, {})
    cls = CONFIG_MAPPING[model_type]
    fields = shrunk(cls(**override.get("defaults", {})))
    for name, value in override.get("fields", {}).items():
        if isinstance(value, dict) and isinstance(fields.get(name), dict):
            fields[name] = {**fields[name], **value}
        else:
            fields[name] = value
    return cls(**fields)


def shrunk(default: Any) -> dict[str, Any]:
    """Arguments of a tiny configuration of the class of `default`."""
    given = default.to_dict()
    fields: dict[str, Any] = {}
    layers = _layers(given)
    for name, value in given.items():
        inner = vars(default).get(name)
        if name in LEFT_OUT:
            continue
        if hasattr(inner, "to_dict"):
            fields[name] = shrunk(inner)
        elif name == "head_dim" and value is None:  # of the hidden size, and not always there
            fields[name] = HEAD
        elif (size := _size(name, value, given)) is not None:
            fields[name] = size
        elif name in DEPTHS:
            fields[name] = len(layers)
        elif name in OTHER_DEPTHS:
            fields[name] = 2
        elif isinstance(value, list) and layers and len(value) == _depth(given):
            fields[name] = [value[layer] for layer in layers]
    if "is_decoder" in given:
        fields["is_decoder"] = True
    fields.update(_tokens(given))
    return fields


def _depth(given: dict[str, Any]) -> int:
    return next((given[name] for name in DEPTHS if isinstance(given.get(name), int)), 0)


def _layers(given: dict[str, Any]) -> list[int]:
    """Layers of the default that the tiny model has: one of each kind, at least two, in order."""
    depth = _depth(given)
    lists = [value for value in given.values() if isinstance(value, list) and depth and len(value) == depth]
    first: dict[str, int] = {}
    for layer in range(depth):
        first.setdefault(json.dumps([each[layer] for each in lists], default=str), layer)
    chosen = sorted(first.values())[:MAX_LAYERS]
    rest = (layer for layer in range(depth) if layer not in chosen)
    return sorted([*chosen, *(next(rest) for _ in range(min(2, depth) - len(chosen)))])


def _size(name: str, value: Any, given: dict[str, Any]) -> int | None:
    """The tiny value of a field, None where it stays or goes."""
    if name not in SIZES or isinstance(value, bool) or not isinstance(value, int) or value < 1:
        return None
    if name.endswith(("key_value_heads", "kv_heads")):
        heads = given.get("num_attention_heads", given.get("n_heads"))
        if value == heads or "kv_lora_rank" in given:
            return HEADS
    return min(value, SIZES[name])


def _tokens(given: dict[str, Any]) -> dict[str, int]:
    """Ids inside the vocabulary for all special tokens that there are."""
    usual = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    found = {name: usual[name] for name in usual if name in given}
    for name, value in given.items():
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCAB_SIZE:
            found.setdefault(name, 3 + len(found))
    return found
