"""GGUF architectures with experts.

Sources: llama.cpp's conversion/*.py and src/models/*.cpp; llama-graph.cpp, build_moe_ffn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sinkexport.loading.gguf_models.dense import RMS, permuted_attention
from sinkexport.loading.gguf_models.facts import Facts, refused
from sinkexport.loading.gguf_models.plan import (
    Plan,
    attention,
    attention_biased,
    head_norms,
    layer,
    layer_types,
    outer,
    pre_norms,
    rope_tensors,
    shared_arguments,
)
from sinkexport.loading.gguf_models.tensors import Rule, gate_and_up

SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN = 1, 2, 3
"""llama.cpp's numbers of gating functions; the last: softmax over those that are chosen."""


def mixtral(facts: Facts) -> Plan:
    """Mixtral, which is written as ``llama`` with experts."""
    arguments = shared_arguments(facts, whole=True, tensors=True)
    if attention_biased(facts):
        raise refused("biases of attention beside experts in 'llama'", "none, as in Mixtral")
    experts, used = _experts(facts, normalised=True)
    return Plan(
        "MixtralConfig",
        arguments
        | {
            "rms_norm_eps": facts.number(RMS),
            "num_local_experts": experts,
            "num_experts_per_tok": used,
            "sliding_window": None,
        },
        (*outer(), *pre_norms(), *permuted_attention(arguments), layer("ffn_gate_inp", "mlp.gate")),
        tuple(_merged_experts(facts)),
        rope_tensors(facts),
    )


def qwen2moe(facts: Facts) -> Plan:
    """Qwen1.5-MoE and Qwen2-57B-A14B: a shared expert with a gate."""
    arguments = shared_arguments(facts, packed=True, feed_forward=False)
    experts, used = _experts(facts, normalised=False)
    shared = [layer(f"ffn_{name}_shexp", f"mlp.shared_expert.{name}_proj") for name in ("gate", "up", "down")]
    gates = [
        Rule(
            (f"model.layers.{number}.mlp.shared_expert_gate.weight",),
            (f"blk.{number}.ffn_gate_inp_shexp.weight",),
            _as_one_row,
        )
        for number in range(facts.num_layers)
    ]
    return Plan(
        "Qwen2MoeConfig",
        arguments
        | {
            "rms_norm_eps": facts.number(RMS),
            "num_experts": experts,
            "num_experts_per_tok": used,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "intermediate_size": facts.count("feed_forward_length", 1),  # of no layer: all have experts
            "moe_intermediate_size": _expert_size(facts, used),
            "shared_expert_intermediate_size": _shared_size(facts),
            "use_sliding_window": False,
        },
        (*outer(), *pre_norms(), *attention(), layer("ffn_gate_inp", "mlp.gate"), *shared),
        (*_merged_experts(facts), *gates),
    )


def qwen3moe(facts: Facts) -> Plan:
    """Qwen3 30B-A3B and 235B-A22B: norms on queries and keys."""
    arguments = shared_arguments(facts, feed_forward=False)
    experts, used = _experts(facts, normalised=True)
    return Plan(
        "Qwen3MoeConfig",
        arguments
        | {
            "rms_norm_eps": facts.number(RMS),
            "attention_bias": attention_biased(facts),
            "num_experts": experts,
            "num_experts_per_tok": used,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "intermediate_size": facts.count("feed_forward_length", 1),  # of no layer: all have experts
            "moe_intermediate_size": _expert_size(facts, used),
            "use_sliding_window": False,
        },
        (*outer(), *pre_norms(), *attention(), *head_norms(), layer("ffn_gate_inp", "mlp.gate")),
        tuple(_merged_experts(facts)),
    )


def minimax_m2(facts: Facts) -> Plan:
    """MiniMax-M2: experts are chosen by sigmoid and bias, weighted by sigmoid; norms over all queries and all keys."""
    facts.value("feed_forward_length")  # of no layer: all have experts
    arguments = shared_arguments(facts, partial=True, feed_forward=False)
    experts, used = _experts(facts, normalised=True, gating=SIGMOID)
    if facts.value("expert_gating_func") is None:
        raise refused("no key 'minimax-m2.expert_gating_func'", f"{SIGMOID}, sigmoid")
    biases = [
        Rule((f"model.layers.{number}.mlp.e_score_correction_bias",), (f"blk.{number}.exp_probs_b.bias",))
        for number in range(facts.num_layers)
    ]
    return Plan(
        "MiniMaxM2Config",
        arguments
        | {
            "rms_norm_eps": facts.number(RMS),
            "num_local_experts": experts,
            "num_experts_per_tok": used,
            "intermediate_size": facts.count("expert_feed_forward_length"),
        },
        (*outer(), *pre_norms(), *attention(), *head_norms(), layer("ffn_gate_inp", "mlp.gate")),
        (*_merged_experts(facts), *biases),
    )


def gpt_oss(facts: Facts) -> Plan:
    """gpt-oss: sink logits, biases everywhere, experts with clamped gates.

    YaRN's bounds are not whole pairs in this model (``truncate: false``); no key says so, and llama.cpp rounds them.
    """
    facts.value("feed_forward_length")  # the experts' has a key of its own
    arguments = shared_arguments(facts, whole=True, truncate=False, feed_forward=False)
    experts, used = _experts(facts, normalised=None, gating=SOFTMAX_OF_CHOSEN)
    facts.expect("rope.freq_base_swa", arguments["rope_parameters"]["rope_theta"], "one base")
    rules = []
    for number in range(facts.num_layers):
        block, mlp = f"blk.{number}.", f"model.layers.{number}.mlp."
        rules.append(Rule((f"model.layers.{number}.self_attn.sinks",), (f"{block}attn_sinks.weight",)))
        for suffix, ending in (("weight", ""), ("bias", "_bias")):
            pair = tuple(f"{block}ffn_{name}_exps.{suffix}" for name in ("gate", "up"))
            rules.append(Rule((f"{mlp}experts.gate_up_proj{ending}",), pair, _interleaved))
        rules.append(Rule((f"{mlp}experts.down_proj",), (f"{block}ffn_down_exps.weight",), _transposed))
        rules.append(Rule((f"{mlp}experts.down_proj_bias",), (f"{block}ffn_down_exps.bias",)))
    norms = (layer("attn_norm", "input_layernorm"), layer("post_attention_norm", "post_attention_layernorm"))
    return Plan(
        "GptOssConfig",
        arguments
        | {
            "rms_norm_eps": facts.number(RMS),
            "attention_bias": True,
            "num_local_experts": experts,
            "num_experts_per_tok": used,
            "intermediate_size": facts.count("expert_feed_forward_length"),
            "sliding_window": facts.count("attention.sliding_window"),
            "layer_types": layer_types(facts, 2),
        },
        (*outer(), *norms, *attention(output_bias=True), layer("ffn_gate_inp", "mlp.router")),
        tuple(rules),
    )


def _experts(facts: Facts, *, normalised: bool | None, gating: int = SOFTMAX) -> tuple[int, int]:
    """Number of experts and of those a token. normalised: whether the architecture makes their weights sum to 1."""
    experts = facts.count("expert_count")
    used = facts.count("expert_used_count")
    if used > experts:
        raise refused(f"'{facts.architecture}.expert_used_count' = {used} of {experts}", "no more than there are")
    facts.expect("expert_weights_scale", 1.0, "weights are not scaled")
    facts.expect("expert_shared_count", 0 if normalised is not False else 1, "shared experts")
    facts.expect("expert_group_count", 0, "groups of experts")
    facts.expect("expert_group_used_count", 0, "groups of experts")
    facts.expect("leading_dense_block_count", 0, "layers without experts")
    if normalised is not None:
        facts.expect("expert_weights_norm", normalised, "fixed by the architecture")
    facts.expect("expert_gating_func", gating, "fixed likewise")
    return experts, used


def _expert_size(facts: Facts, used: int) -> int:
    """Columns of an expert; old files give those of all that a token uses."""
    total = facts.count("feed_forward_length", used)
    return facts.count("expert_feed_forward_length", total // used)


def _shared_size(facts: Facts) -> int:
    return facts.count("expert_shared_feed_forward_length", facts.count("feed_forward_length", 1))


def _merged_experts(facts: Facts) -> list[Rule]:
    rules = []
    for number in range(facts.num_layers):
        block, mlp = f"blk.{number}.", f"model.layers.{number}.mlp.experts."
        pair = (f"{block}ffn_gate_exps.weight", f"{block}ffn_up_exps.weight")
        rules.append(Rule((f"{mlp}gate_up_proj",), pair, gate_and_up))
        rules.append(Rule((f"{mlp}down_proj",), (f"{block}ffn_down_exps.weight",)))
    return rules


def _as_one_row(parts: Sequence[Any]) -> Any:
    return parts[0].reshape(1, -1)


def _transposed(parts: Sequence[Any]) -> Any:
    """[E, H, I] as [E, I, H]."""
    return parts[0].swapaxes(1, 2)


def _interleaved(parts: Sequence[Any]) -> Any:
    """Gates and ups, [E, I, H] each, as [E, H, 2I] with each gate before its up; biases [E, I] as [E, 2I]."""
    import numpy as np

    together = np.stack(parts, axis=2)  # [E, I, 2, H], [E, I, 2]
    together = together.reshape(together.shape[0], -1, *together.shape[3:])
    return together.swapaxes(1, 2) if together.ndim == 3 else together
