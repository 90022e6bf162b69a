"""GGUF architectures of older families, whose queries, keys and values are one matrix.

Sources: llama.cpp's conversion/{falcon,bloom,mpt,gptneox}.py and src/models/*.cpp.
"""

from __future__ import annotations

from typing import Any

from sinkexport.loading.gguf_models.dense import EPS
from sinkexport.loading.gguf_models.facts import Facts, refused
from sinkexport.loading.gguf_models.plan import Plan, layer, outer, packed_heads, shared_arguments, sizes
from sinkexport.loading.gguf_models.tensors import Module, by_groups


def falcon(facts: Facts) -> Plan:
    """Falcon 7B (one head of keys), 40B and 180B (groups, two norms), Falcon 2 (groups, one norm)."""
    arguments = shared_arguments(facts, packed=True, whole=True)
    heads, groups = arguments["num_attention_heads"], arguments.pop("num_key_value_heads")
    two_norms = facts.has("blk.{i}.attn_norm_2.weight")
    if groups == heads and not two_norms:
        raise refused(
            f"falcon with {groups} heads of keys, as Falcon-RW has, whose ALiBi no key states",
            "one, or groups",
            "export its checkpoint folder",
        )
    new = two_norms or groups > 1
    norms = (("attn_norm_2", "ln_attn"), ("attn_norm", "ln_mlp")) if two_norms else (("attn_norm", "input_layernorm"),)
    root = "transformer.h.{i}."
    arguments["ffn_hidden_size"] = arguments.pop("intermediate_size")
    return Plan(
        "FalconConfig",
        arguments
        | {
            "layer_norm_epsilon": facts.number(EPS),
            "new_decoder_architecture": new,
            "num_kv_heads": groups,
            "num_ln_in_parallel_attn": (2 if two_norms else 1) if new else None,
            "multi_query": groups == 1,
            "parallel_attn": True,
            "bias": False,
            "alibi": False,
        },
        (
            *outer("transformer.ln_f", "transformer.word_embeddings"),
            *(layer(gguf, hf, root=root) for gguf, hf in norms),
            layer("attn_qkv", "self_attention.query_key_value", by_groups(groups, heads // groups), root=root),
            layer("attn_output", "self_attention.dense", root=root),
            layer("ffn_up", "mlp.dense_h_to_4h", root=root),
            layer("ffn_down", "mlp.dense_4h_to_h", root=root),
        ),
    )


def bloom(facts: Facts) -> Plan:
    """BLOOM: ALiBi, biases everywhere, a norm behind the embedding."""
    arguments = sizes(facts)
    packed_heads(facts, arguments)
    heads, hidden = arguments.pop("num_attention_heads"), arguments["hidden_size"]
    if arguments.pop("num_key_value_heads") != heads:
        raise refused("bloom with groups of heads", "as many heads of keys as of queries")
    if arguments.pop("intermediate_size") != 4 * hidden:
        raise refused("'bloom.feed_forward_length'", f"{4 * hidden}, the only one in transformers")
    arguments.pop("max_position_embeddings")
    arguments["n_layer"], arguments["n_head"] = arguments.pop("num_hidden_layers"), heads
    facts.expect("attention.max_alibi_bias", 8.0, "as in BLOOM")
    root = "transformer.h.{i}."
    return Plan(
        "BloomConfig",
        arguments | {"layer_norm_epsilon": facts.number(EPS), "apply_residual_connection_post_layernorm": False},
        (
            *outer("transformer.ln_f", "transformer.word_embeddings"),
            Module("token_embd_norm", "transformer.word_embeddings_layernorm"),
            layer("attn_norm", "input_layernorm", root=root),
            layer("attn_qkv", "self_attention.query_key_value", by_groups(heads, 1), root=root),
            layer("attn_output", "self_attention.dense", root=root),
            layer("ffn_norm", "post_attention_layernorm", root=root),
            layer("ffn_up", "mlp.dense_h_to_4h", root=root),
            layer("ffn_down", "mlp.dense_4h_to_h", root=root),
        ),
    )


def mpt(facts: Facts) -> Plan:
    """MPT: ALiBi, clamped queries, keys and values, no biases."""
    arguments = sizes(facts)
    packed_heads(facts, arguments)
    heads, hidden = arguments["num_attention_heads"], arguments["hidden_size"]
    if arguments["num_key_value_heads"] != heads:
        raise refused("mpt with groups of heads", "as many heads of keys as of queries")
    if arguments["intermediate_size"] % hidden:
        raise refused(f"'mpt.feed_forward_length' = {arguments['intermediate_size']}", f"a multiple of {hidden}")
    if not facts.value("attention.max_alibi_bias"):
        raise refused("mpt without ALiBi, whose positions are learned", "'mpt.attention.max_alibi_bias'")
    largest = facts.number("attention.max_alibi_bias")
    if largest != int(largest):
        raise refused(f"'mpt.attention.max_alibi_bias' = {largest}", "a whole number, as transformers takes it")
    settings: dict[str, Any] = {"alibi": True, "alibi_bias_max": int(largest), "clip_qkv": None}
    if facts.value("attention.clamp_kqv"):
        settings["clip_qkv"] = facts.number("attention.clamp_kqv")
    keep = ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    root = "transformer.blocks.{i}."
    return Plan(
        "MptConfig",
        {key: arguments[key] for key in keep}
        | {
            "d_model": hidden,
            "n_heads": heads,
            "n_layers": facts.num_layers,
            "expansion_ratio": arguments["intermediate_size"] // hidden,
            "max_seq_len": arguments["max_position_embeddings"],
            "layer_norm_epsilon": facts.number(EPS),
            "no_bias": True,
            "attn_config": settings,
        },
        (
            *outer("transformer.norm_f", "transformer.wte"),
            layer("attn_norm", "norm_1", root=root),
            layer("attn_qkv", "attn.Wqkv", root=root),
            layer("attn_output", "attn.out_proj", root=root),
            layer("ffn_norm", "norm_2", root=root),
            layer("ffn_up", "ffn.up_proj", root=root),
            layer("ffn_down", "ffn.down_proj", root=root),
        ),
    )


def gptneox(facts: Facts) -> Plan:
    """Pythia and GPT-NeoX: partly rotated heads, biases everywhere."""
    arguments = shared_arguments(facts, packed=True, partial=True)
    heads = arguments["num_attention_heads"]
    if arguments.pop("num_key_value_heads") != heads:
        raise refused("gptneox with groups of heads", "as many heads of keys as of queries")
    root = "gpt_neox.layers.{i}."
    return Plan(
        "GPTNeoXConfig",
        arguments
        | {
            "layer_norm_eps": facts.number(EPS),
            "use_parallel_residual": facts.flag("use_parallel_residual", True),
            "attention_bias": True,
        },
        (
            *outer("gpt_neox.final_layer_norm", "gpt_neox.embed_in"),
            layer("attn_norm", "input_layernorm", root=root),
            layer("ffn_norm", "post_attention_layernorm", root=root),
            layer("attn_qkv", "attention.query_key_value", by_groups(heads, 1), root=root),
            layer("attn_output", "attention.dense", root=root),
            layer("ffn_up", "mlp.dense_h_to_4h", root=root),
            layer("ffn_down", "mlp.dense_4h_to_h", root=root),
        ),
    )
