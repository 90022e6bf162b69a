"""Tiny models with random weights, one for each family that is exported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tokenizers
import torch
import transformers
from sinkexport.loading.tokenizers.source_tokenizer import SourceTokenizer

from tests.exporter.tiny_common import COMMON, DELTA_RULE, SHARED_EXPERT, without
from tests.exporter.tiny_latent import LATENT
from tests.exporter.tiny_positions import POSITIONED
from tests.exporter.tiny_recurrent import RECURRENT
from tests.exporter.tiny_uncommon import UNCOMMON
from tests.support import VOCAB_SIZE

torch.set_num_threads(1)  # tiny matrices are faster without handing work around

_NO_GROUPS = without(COMMON, "num_key_value_heads")
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**COMMON, "head_dim": 16}),
    "llama-tied": ("LlamaConfig", {**COMMON, "head_dim": 8, "tie_word_embeddings": True}),
    "llama-mha": ("LlamaConfig", {**COMMON, "num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True}),
    "llama3-rope": (
        "LlamaConfig",
        {
            **COMMON,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "llama-linear-rope": (
        "LlamaConfig",
        {**COMMON, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama-yarn": (
        "LlamaConfig",
        {
            **COMMON,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": ("MistralConfig", {**COMMON, "sliding_window": 64}),
    "qwen2": ("Qwen2Config", COMMON),
    "qwen3": ("Qwen3Config", {**COMMON, "head_dim": 16}),
    "phi": ("PhiConfig", {**COMMON, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3Config", COMMON),
    "phi3-partial": (
        "Phi3Config",
        {
            **COMMON,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "short_factor": [1.1, 1.4],
                "long_factor": [3.0, 5.0],
            },
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {**_NO_GROUPS, "rotary_pct": 0.25, "hidden_size": 96}),
    "olmo": ("OlmoConfig", COMMON),
    "olmo2": ("Olmo2Config", COMMON),
    "stablelm": ("StableLmConfig", {**COMMON, "hidden_size": 96, "partial_rotary_factor": 0.25}),
    "granite": (
        "GraniteConfig",
        {
            **COMMON,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
        },
    ),
    "smollm3": ("SmolLM3Config", {**COMMON, "num_hidden_layers": 4}),
    "starcoder2": ("Starcoder2Config", {**COMMON, "use_bias": True}),
    "cohere": ("CohereConfig", COMMON),
    "glm": ("GlmConfig", {**COMMON, "head_dim": 8}),
    "gemma": ("GemmaConfig", {**COMMON, "head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        {**COMMON, "head_dim": 16, "sliding_window": 64, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        {
            **COMMON,
            "head_dim": 16,
            "sliding_window": 5,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 16,
        },
    ),
    "cohere2": (
        "Cohere2Config",
        {**COMMON, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "bloom": ("BloomConfig", {"vocab_size": VOCAB_SIZE, "hidden_size": 48, "n_layer": 2, "n_head": 6}),
    "mpt": (
        "MptConfig",
        {
            "vocab_size": VOCAB_SIZE,
            "d_model": 48,
            "n_layers": 2,
            "n_heads": 6,
            "expansion_ratio": 2,
            "max_seq_len": 64,
            "attn_config": {"clip_qkv": 2.0},
        },
    ),
    "falcon": ("FalconConfig", {**_NO_GROUPS, "multi_query": True, "parallel_attn": True, "bias": False}),
    "falcon-groups": ("FalconConfig", {**_NO_GROUPS, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": (
        "FalconConfig",
        {**_NO_GROUPS, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "mixtral": ("MixtralConfig", {**COMMON, "num_local_experts": 8, "num_experts_per_tok": 1}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            **COMMON,
            "head_dim": 8,
            "moe_intermediate_size": 32,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [0],
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            **COMMON,
            "head_dim": 8,
            "sliding_window": 7,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "truncate": False,
            },
        },
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **COMMON,
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 16,
            "partial_rotary_factor": 0.25,
            **DELTA_RULE,
            **SHARED_EXPERT,
        },
    ),
    "qwen3_5_text": (
        "Qwen3_5TextConfig",
        {
            **COMMON,
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 16,
            **DELTA_RULE,
        },
    ),
    "gptj": (
        "GPTJConfig",
        {"vocab_size": VOCAB_SIZE, "n_embd": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 512},
    ),
    "codegen": (
        "CodeGenConfig",
        {
            "vocab_size": VOCAB_SIZE,
            "n_embd": 96,
            "n_layer": 2,
            "n_head": 8,
            "rotary_dim": 4,
            "n_positions": 512,
            "n_ctx": 512,
        },
    ),
}
TINY |= {
    "laguna": (
        "LagunaConfig",
        {
            **COMMON,
            "head_dim": 8,
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention"],
            "num_attention_heads_per_layer": [4, 6],
            "mlp_layer_types": ["dense", "sparse"],
            **SHARED_EXPERT,
        },
    ),
    "mimo_v2_flash": (
        "MiMoV2FlashConfig",
        {
            **COMMON,
            "num_attention_heads": 8,
            "head_dim": 16,
            "v_head_dim": 8,
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention"],
            "mlp_layer_types": ["dense", "sparse"],
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
}
TINY |= RECURRENT | LATENT | UNCOMMON | POSITIONED

RE_ROTATED = (
    *(
        "llama",
        "llama-tied",
        "llama-mha",
        "llama3-rope",
        "llama-linear-rope",
        "llama-yarn",
        "mistral",
        "qwen2",
        "qwen3",
    ),
    *("phi", "phi3", "phi3-partial", "gpt_neox", "olmo", "olmo2", "stablelm", "granite", "smollm3", "starcoder2"),
    *("cohere", "cohere2", "glm", "gemma", "gemma2", "gemma3_text", "bloom", "mpt", "gptj", "codegen"),
    *("falcon", "falcon-groups", "falcon-alibi", "mixtral", "qwen3_moe", "gpt_oss"),
    *("qwen3_next", "qwen3_5_text", "olmo_hybrid"),
    *("lfm2", "lfm2_moe", "granitemoehybrid", "bamba", "falcon_h1", "jamba"),
)
"""Models of `TINY` that the re-rotating reference follows; the call-following one follows all."""


DAILY = (
    *("llama", "llama-yarn", "phi3-partial", "gpt_neox", "cohere", "gptj"),  # ways to rotate
    *("bloom", "mpt", "falcon", "gemma3_text", "modernbert-decoder", "doge"),  # masks, ALiBi, windows
    *("mixtral", "jetmoe"),  # experts
    *("qwen3_5_text", "lfm2", "nemotron_h", "recurrent_gemma", "minimax", "bailing_hybrid", "rwkv", "xlstm", "zaya"),
    *("deepseek_v3", "deepseek_v32", "laguna", "diffllama", "hrm_text"),  # caches, indexers, heads and calls of layers
)
"""Models of `TINY` for each day: one for each mechanism. The others have a test of a mechanism each night."""


DECODE_GRAPH = {"num_sink_tokens": 4, "window_size": 12, "batch": 1, "chunk_size": 1}
"""Arguments of `shared_export` for tests that read the decode graph of a family: it is exported once for all."""


def tiny_model(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of `TINY` in evaluation mode, with weights large enough for attention to matter.

    changes: of the arguments of its configuration.
    """
    config_class, arguments = TINY[name]
    return random_model(getattr(transformers, config_class)(**{**arguments, **changes}), seed=seed, dtype=dtype)


def random_model(config: Any, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A model of a configuration in evaluation mode, with weights large enough for attention to matter."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # default initialisation gives all but uniform attention
                parameter.normal_(0.0, 0.25)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def model_with_a_sink(token: int, heads: Sequence[Sequence[bool]] = ((True,) * 6,) * 2) -> Any:
    """`llama-mha` whose heads look at `token` wherever it stands, and at nothing else in particular.

    heads: [2][6], those that do; the others look at all tokens alike. The layers add nothing to the embeddings.
    """
    model = tiny_model("llama-mha")
    with torch.no_grad():
        for layer, liking in zip(model.model.layers, heads, strict=True):
            attention = layer.self_attn
            for part in (attention.q_proj, attention.k_proj):
                part.weight.mul_(0.05)
                part.bias.zero_()
            # The slowest pair of dimensions turns little over 96 tokens: queries point its way by their bias.
            attention.q_proj.bias.view(6, -1)[:, 3] = 8.0 * torch.tensor(liking)
            attention.k_proj.weight.view(6, -1, 48)[:, 3] = 0.0
            attention.k_proj.weight.view(6, -1, 48)[:, 3, 0] = 1.0
            attention.o_proj.weight.zero_()
            attention.o_proj.bias.zero_()
            layer.mlp.down_proj.weight.zero_()
            layer.mlp.down_proj.bias.zero_()
            layer.input_layernorm.weight.fill_(1.0)
        model.model.embed_tokens.weight[:, 0] = 0.0
        model.model.embed_tokens.weight[token, 0] = 5.0
    return model


def word_tokenizer() -> tokenizers.Tokenizer:
    """One word a token: ``w0`` to the last of the vocabulary."""
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return tokenizer


def tiny_tokenizer() -> SourceTokenizer:
    """`word_tokenizer` as an export takes it."""
    return SourceTokenizer("tiny", word_tokenizer(), special_tokens={"unk_token": "w0"})
