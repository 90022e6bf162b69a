"""GGUF architectures of dense models: one function each.

Sources: llama.cpp's conversion/*.py (what was written) and src/models/*.cpp (what it is read as).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sinkexport.loading.gguf_models.facts import MAX_LENGTH, Facts, refused
from sinkexport.loading.gguf_models.plan import (
    BLOCK,
    LAYER,
    Plan,
    attention,
    attention_biased,
    biased,
    gated_mlp,
    head_norms,
    layer,
    layer_types,
    outer,
    pre_norms,
    rope_tensors,
    shared_arguments,
)
from sinkexport.loading.gguf_models.tensors import Module, Rule, minus_one, stacked, unpermute

RMS, EPS = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"


def llama(facts: Facts) -> Plan:
    """Llama, Mistral, SmolLM2 and others; queries and keys are permuted. With experts see experts.mixtral."""
    arguments = shared_arguments(facts, whole=True, tensors=True)
    return Plan(
        "LlamaConfig",
        arguments
        | {
            "rms_norm_eps": facts.number(RMS),
            "attention_bias": attention_biased(facts),
            "mlp_bias": biased(facts, "ffn_gate", "ffn_up", "ffn_down"),
        },
        (*outer(), *pre_norms(), *permuted_attention(arguments), *gated_mlp()),
        used=rope_tensors(facts),
    )


def permuted_attention(arguments: dict[str, Any]) -> tuple[Module, ...]:
    """Projections of attention whose queries and keys llama.cpp rotates by neighbours."""
    return attention(unpermute(arguments["num_attention_heads"]), unpermute(arguments["num_key_value_heads"]))


def qwen2(facts: Facts) -> Plan:
    """Qwen2 and Qwen2.5: biases on queries, keys and values."""
    arguments = shared_arguments(facts, packed=True)
    return Plan(
        "Qwen2Config",
        arguments | {"rms_norm_eps": facts.number(RMS)},
        (*outer(), *pre_norms(), *attention(), *gated_mlp()),
    )


def qwen3(facts: Facts) -> Plan:
    """Qwen3: norms on queries and keys."""
    arguments = shared_arguments(facts)
    return Plan(
        "Qwen3Config",
        arguments
        | {
            "rms_norm_eps": facts.number(RMS),
            "attention_bias": attention_biased(facts),
        },
        (*outer(), *pre_norms(), *attention(), *head_norms(), *gated_mlp()),
    )


def smollm3(facts: Facts) -> Plan:
    """SmolLM3: no rotation in every fourth layer."""
    plan = llama(facts)
    return dataclasses.replace(
        plan,
        config_class="SmolLM3Config",
        arguments={
            **plan.arguments,
            "use_sliding_window": False,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(facts.num_layers)],
        },
    )


def granite(facts: Facts) -> Plan:
    """Granite 3: a Llama with multipliers."""
    facts.expect("rope.scaling.finetuned", True, "false: no positions at all")
    plan = llama(facts)
    arguments = plan.arguments
    multipliers = {
        "attention_multiplier": facts.number("attention.scale", arguments["head_dim"] ** -0.5),
        "embedding_multiplier": facts.number("embedding_scale", 1.0),
        "residual_multiplier": facts.number("residual_scale", 1.0),
        "logits_scaling": facts.number("logit_scale"),
    }
    return dataclasses.replace(plan, config_class="GraniteConfig", arguments={**arguments, **multipliers})


def olmo(facts: Facts) -> Plan:
    """OLMo: norms without weights, of 1e-5 in transformers."""
    arguments = shared_arguments(facts, packed=True)
    if facts.number(EPS) != 1e-5:
        raise refused(f"'olmo.{EPS}' = {facts.number(EPS)}", "1e-05, the only one in transformers")
    clip = {"clip_qkv": facts.number("attention.clamp_kqv")} if facts.value("attention.clamp_kqv") else {}
    modules = (*(one for one in outer() if one.gguf != "output_norm"), *permuted_attention(arguments), *gated_mlp())
    return Plan("OlmoConfig", arguments | clip, modules)


def olmo2(facts: Facts) -> Plan:
    """OLMo 2: norms behind attention and MLP, and over all queries and all keys. OLMo 3: a window in three of four."""
    arguments = shared_arguments(facts, packed=True, whole=True)
    norms = (
        layer("post_attention_norm", "post_attention_layernorm"),
        layer("post_ffw_norm", "post_feedforward_layernorm"),
    )
    modules = (*outer(), *norms, *attention(), *head_norms(), *gated_mlp())
    full = arguments["rope_parameters"]
    arguments["rms_norm_eps"] = facts.number(RMS)
    window = facts.count("attention.sliding_window", 0, least=0)
    if not window:
        return Plan("Olmo2Config", arguments, modules)
    local = {"rope_type": "default", "rope_theta": full["rope_theta"]}  # never scaled
    facts.expect("rope.freq_base_swa", full["rope_theta"], "one base")
    more = {
        "sliding_window": window,
        "layer_types": layer_types(facts, 4),
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
    }
    return Plan("Olmo3Config", arguments | more, modules)


def stablelm(facts: Facts) -> Plan:
    """StableLM 3B and 2: layer norms, partly rotated heads; 12B: norms on each head, attention beside the MLP."""
    arguments = shared_arguments(facts, packed=True, partial=True)
    parallel = not facts.has("blk.{i}.ffn_norm.weight")
    if facts.flag("use_parallel_residual", parallel) != parallel:
        # llama.cpp goes by the tensor alone; so did the converter's flag in all files that are known.
        raise refused(
            f"'stablelm.use_parallel_residual' = {not parallel} with{'out' * parallel} 'ffn_norm'",
            "a flag that fits the tensors",
        )
    return Plan(
        "StableLmConfig",
        arguments
        | {
            "layer_norm_eps": facts.number(EPS),
            "use_qkv_bias": biased(facts, "attn_q", "attn_k", "attn_v"),
            "use_parallel_residual": parallel,
            "qk_layernorm": facts.has("blk.{i}.attn_q_norm.weight"),
        },
        (*outer(), *pre_norms(), *attention(), *gated_mlp()),
        tuple(_norm_of_each_head(facts, arguments)),
    )


def _norm_of_each_head(facts: Facts, arguments: dict[str, Any]) -> list[Rule]:
    """Norms [heads, D] of one tensor; the model has a parameter for each head, of the whole tensor's rows in order."""
    rules = []
    for letter, heads in (("q", arguments["num_attention_heads"]), ("k", arguments["num_key_value_heads"])):
        for number in range(facts.num_layers):
            tensor = f"{BLOCK}attn_{letter}_norm.weight".format(i=number)
            if tensor in facts.tensors:
                name = f"{LAYER}self_attn.{letter}_layernorm.norms".format(i=number)
                rules.append(Rule(tuple(f"{name}.{head}.weight" for head in range(heads)), (tensor,)))
    return rules


def starcoder2(facts: Facts) -> Plan:
    """StarCoder2: layer norms and biases."""
    arguments = shared_arguments(facts, packed=True, whole=True)
    mlp = (layer("ffn_up", "mlp.c_fc"), layer("ffn_down", "mlp.c_proj"))
    return Plan(
        "Starcoder2Config",
        arguments
        | {
            "norm_epsilon": facts.number(EPS),
            "use_bias": biased(facts, "attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"),
            "sliding_window": None,
        },
        (*outer(), *pre_norms(), *attention(output_bias=True), *mlp),
    )


def nemotron(facts: Facts) -> Plan:
    """Nemotron and Minitron: layer norms whose weights are kept with 1 added, squared ReLU."""
    arguments = shared_arguments(facts, partial=True)
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    norms = [Module(f"{BLOCK}{gguf}", f"{LAYER}{hf}", minus_one, both=False) for gguf, hf in names.items()]
    last = Module("output_norm", "model.norm", minus_one, both=False)
    mlp = tuple(layer(f"ffn_{name}", f"mlp.{name}_proj", optional_bias=True) for name in ("up", "down"))
    return Plan(
        "NemotronConfig",
        arguments
        | {
            "norm_eps": facts.number(EPS),
            "attention_bias": attention_biased(facts),
            "mlp_bias": biased(facts, "ffn_up", "ffn_down"),
        },
        (*(one for one in outer() if one.gguf != "output_norm"), last, *norms, *attention(), *mlp),
    )


def phi2(facts: Facts) -> Plan:
    """Phi-1.5 and Phi-2: attention beside the MLP, biases everywhere, partly rotated heads."""
    arguments = shared_arguments(facts, packed=True, partial=True)
    if facts.has("blk.{i}.attn_qkv.weight"):
        raise refused("'blk.0.attn_qkv.weight', as converters wrote it until 2024", "queries, keys and values apart")
    return Plan(
        "PhiConfig",
        arguments | {"layer_norm_eps": facts.number(EPS)},
        (
            *outer(norm="model.final_layernorm"),
            layer("attn_norm", "input_layernorm"),
            *attention(output="dense", output_bias=True),
            layer("ffn_up", "mlp.fc1"),
            layer("ffn_down", "mlp.fc2"),
        ),
    )


def phi3(facts: Facts) -> Plan:
    """Phi-3, Phi-3.5, Phi-4: fused projections, factors for long and short texts, a window where the file has one."""
    arguments = shared_arguments(facts, packed=True, tensors=True)
    window = facts.count("attention.sliding_window", 0, least=0)
    original = facts.count("rope.scaling.original_context_length", facts.context_length, most=MAX_LENGTH)
    rules = []
    if not facts.has("blk.{i}.attn_qkv.weight"):
        for number in range(facts.num_layers):
            parts = tuple(f"blk.{number}.attn_{letter}.weight" for letter in "qkv")
            rules.append(Rule((f"model.layers.{number}.self_attn.qkv_proj.weight",), parts, stacked))
    return Plan(
        "Phi3Config",
        arguments
        | {
            "rms_norm_eps": facts.number(RMS),
            "sliding_window": window or None,
            "original_max_position_embeddings": original,
        },
        (
            *outer(),
            *pre_norms(),
            layer("attn_qkv", "self_attn.qkv_proj"),
            layer("attn_output", "self_attn.o_proj"),
            layer("ffn_up", "mlp.gate_up_proj"),
            layer("ffn_down", "mlp.down_proj"),
        ),
        tuple(rules),
        rope_tensors(facts),
    )


def glm4(facts: Facts) -> Plan:
    """GLM-4 0414: norms before and behind, neighbours rotated, half of each head."""
    facts.expect("rope.dimension_sections", [0, 0, 0, 0], "positions by axis are for pictures")
    arguments = shared_arguments(facts, partial=True)
    norms = (
        *pre_norms()[:1],
        layer("post_attention_norm", "post_self_attn_layernorm"),
        layer("ffn_norm", "post_attention_layernorm"),
        layer("post_ffw_norm", "post_mlp_layernorm"),
    )
    return Plan(
        "Glm4Config",
        arguments
        | {
            "rms_norm_eps": facts.number(RMS),
            "attention_bias": biased(facts, "attn_q", "attn_k", "attn_v"),
        },
        (*outer(), *norms, *attention(), layer("ffn_up", "mlp.gate_up_proj"), layer("ffn_down", "mlp.down_proj")),
    )


def command_r(facts: Facts) -> Plan:
    """Command R: layer norms without bias, neighbours rotated, scaled logits; Plus: norms on each head."""
    arguments = shared_arguments(facts, packed=True)
    return Plan(
        "CohereConfig",
        arguments
        | {
            "layer_norm_eps": facts.number(EPS),
            "logit_scale": facts.number("logit_scale", 1.0),
            "use_qk_norm": facts.has("blk.{i}.attn_q_norm.weight"),
        },
        (*outer(), layer("attn_norm", "input_layernorm"), *attention(), *head_norms(), *gated_mlp()),
    )


def cohere2(facts: Facts) -> Plan:
    """Command R7B: three layers with a window and rotation, one without either."""
    arguments = shared_arguments(facts)
    facts.expect("rope.freq_base_swa", arguments["rope_parameters"]["rope_theta"], "one base")
    return Plan(
        "Cohere2Config",
        arguments
        | {
            "layer_norm_eps": facts.number(EPS),
            "logit_scale": facts.number("logit_scale"),
            "sliding_window": facts.count("attention.sliding_window"),
            "layer_types": layer_types(facts, 4),
        },
        (*outer(), layer("attn_norm", "input_layernorm"), *attention(), *gated_mlp()),
    )
