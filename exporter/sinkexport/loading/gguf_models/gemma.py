"""GGUF architectures of the Gemma family: their norms are kept with 1 added, their heads are not in the metadata.

Sources: llama.cpp's conversion/gemma.py and src/models/gemma*.cpp.
"""

from __future__ import annotations

import dataclasses

from sinkexport.loading.gguf_models.facts import Facts, refused
from sinkexport.loading.gguf_models.plan import (
    Plan,
    attention,
    gated_mlp,
    head_norms,
    layer,
    layer_types,
    shared_arguments,
)
from sinkexport.loading.gguf_models.rope import DEFAULT_BASE
from sinkexport.loading.gguf_models.tensors import Module, minus_one

RMS = "attention.layer_norm_rms_epsilon"
LARGEST_GEMMA2, LARGEST_GEMMA3 = 46, 62
"""Layers of the 27B models, whose queries are scaled by columns over heads: no key says so, llama.cpp goes by this."""


def gemma(facts: Facts) -> Plan:
    """Gemma 1."""
    arguments = shared_arguments(facts)
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    return Plan(
        "GemmaConfig",
        arguments | {"rms_norm_eps": facts.number(RMS)},
        (*_outer(), *(layer(gguf, hf, minus_one) for gguf, hf in names.items()), *attention(), *gated_mlp()),
    )


def gemma2(facts: Facts) -> Plan:
    """Gemma 2: soft caps, a window in every other layer."""
    plan = gemma(facts)
    arguments = plan.arguments
    facts.expect("rope.freq_base_swa", arguments["rope_parameters"]["rope_theta"], "one base")
    more = {
        "attn_logit_softcapping": facts.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": facts.number("final_logit_softcapping", 30.0),
        "sliding_window": facts.count("attention.sliding_window", 4096),
        "layer_types": layer_types(facts, 2),
        "query_pre_attn_scalar": _query_scalar(facts, plan, LARGEST_GEMMA2),
    }
    modules = (*_outer(), *_four_norms(), *attention(), *gated_mlp())
    return Plan("Gemma2Config", {**arguments, **more}, modules)


def gemma3(facts: Facts) -> Plan:
    """Gemma 3, text: norms on queries and keys, two rotations, a window in five layers of six."""
    plan = gemma(facts)
    full = plan.arguments["rope_parameters"]
    window = facts.count("attention.sliding_window", 0, least=0)
    types = layer_types(facts, 6) if window else ["full_attention"] * facts.num_layers
    local = facts.number("rope.freq_base_swa", DEFAULT_BASE)  # never scaled
    if "partial_rotary_factor" in full:
        raise refused("'gemma3.rope.dimension_count' below the head's columns", "whole heads rotated")
    capped = bool(facts.value("final_logit_softcapping"))  # 0 is none
    more = {
        "final_logit_softcapping": facts.number("final_logit_softcapping") if capped else None,
        "attn_logit_softcapping": None,
        "sliding_window": window or 4096,  # of no layer, if the file has no window
        "layer_types": types,
        "query_pre_attn_scalar": _query_scalar(facts, plan, LARGEST_GEMMA3),
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }
    modules = (*_outer(), *_four_norms(), *attention(), *head_norms(minus_one), *gated_mlp())
    return dataclasses.replace(
        plan, config_class="Gemma3TextConfig", arguments={**plan.arguments, **more}, modules=modules
    )


def _query_scalar(facts: Facts, plan: Plan, largest: int) -> int:
    if facts.num_layers == largest:
        return int(plan.arguments["hidden_size"] // plan.arguments["num_attention_heads"])
    return int(plan.arguments["head_dim"])


def _outer() -> tuple[Module, ...]:
    return (
        Module("token_embd", "model.embed_tokens"),
        Module("output_norm", "model.norm", minus_one),
        Module("output", "lm_head"),
    )


def _four_norms() -> tuple[Module, ...]:
    names = {
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
    return tuple(layer(gguf, hf, minus_one) for gguf, hf in names.items())
