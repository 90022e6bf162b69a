"""Which model families export, and why the others are refused. Importable without torch.

Export itself is generic: a model is probed and traced, and refused if anything about it is not understood. The
rows here tell users what to expect; a family that is not listed is tried all the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
    """One line of ``sinkexport inspect families``.

    family: transformers' model_type. examples: models that people know. positions: how it tells positions.
    exact: whether exported bundles equal the definition; `reason`: a remark, or why the family is refused.
    """

    family: str
    examples: str
    positions: str
    exact: bool = True
    reason: str = ""


EXPORTED = (
    Family("llama", "Llama 1-3, SmolLM, SmolLM2, TinyLlama, Yi", "RoPE"),
    Family("mistral", "Mistral 7B, Ministral", "RoPE", True, "capacity up to the model's own sliding window"),
    Family("qwen2", "Qwen2, Qwen2.5", "RoPE", True, "capacity up to the model's own sliding window"),
    Family("qwen3", "Qwen3", "RoPE", True, "norms on queries and keys"),
    Family("phi", "Phi-1.5, Phi-2", "RoPE, partial"),
    Family("phi3", "Phi-3, Phi-3.5, Phi-4", "RoPE, partial in Phi-4-mini", True, "longrope up to its original length"),
    Family("gpt_neox", "Pythia, GPT-NeoX-20B", "RoPE, partial", True, "parallel residual"),
    Family("olmo", "OLMo", "RoPE"),
    Family("olmo2", "OLMo 2", "RoPE", True, "norms on queries and keys"),
    Family("stablelm", "StableLM 2, StableLM 3B", "RoPE, partial"),
    Family("granite", "Granite 3", "RoPE", True, "logit, residual and attention multipliers"),
    Family("smollm3", "SmolLM3", "RoPE, none in every fourth layer"),
    Family("starcoder2", "StarCoder2", "RoPE", True, "capacity up to the model's own sliding window"),
    Family("cohere", "Command R", "RoPE, interleaved"),
    Family("glm", "GLM-4 9B", "RoPE, partial and interleaved"),
    Family("gemma", "Gemma 1", "RoPE"),
    Family("gemma2", "Gemma 2", "RoPE", True, "softcap; capacity up to the model's own sliding window"),
)

REFUSED = (
    Family("gpt2", "GPT-2", "learned absolute", False, "learns a vector for each absolute position"),
    Family("opt", "OPT", "learned absolute", False, "learns a vector for each absolute position"),
    Family("gpt_bigcode", "StarCoder", "learned absolute", False, "learns a vector for each absolute position"),
    Family("gpt_neo", "GPT-Neo", "learned absolute", False, "learns a vector for each absolute position"),
    Family("mpt", "MPT", "ALiBi", False, "has ALiBi positions, which this version does not export"),
    Family("bloom", "BLOOM", "ALiBi", False, "has ALiBi positions, which this version does not export"),
    Family("falcon", "Falcon", "RoPE or ALiBi", False, "does not use transformers' attention interface"),
    Family("gptj", "GPT-J", "RoPE, interleaved", False, "does not use transformers' attention interface"),
    Family("codegen", "CodeGen", "RoPE, interleaved", False, "does not use transformers' attention interface"),
    Family("gemma3_text", "Gemma 3", "RoPE, two bases", False, "has layers with rotary bases of their own"),
    Family("gpt_oss", "gpt-oss", "RoPE, YaRN", False, "has learned sink logits, which this version does not export"),
    Family("mamba", "Mamba", "recurrent", False, "has no attention"),
    Family("t5", "T5", "relative bias", False, "is an encoder-decoder"),
)


def describe() -> list[Family]:
    """Every family that is known: exported ones first."""
    return [*EXPORTED, *REFUSED]


def refusal_of_config(config: Any) -> str | None:
    """Why a transformers configuration rules out an exact export, or None if it does not.

    Reads the configuration only, so that a refusal comes before the weights are loaded.
    """
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder-decoder"
    for family in REFUSED:
        if config.model_type == family.family:
            return family.reason
    quantization = getattr(config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else getattr(
        quantization, "quant_method", None
    )
    if quantization is not None and str(getattr(method, "value", method)) != "gguf":
        return f"has weights quantized by {method}: export the original floating-point model"
    rope_type = rope_parameters(config).get("rope_type", "default")
    if rope_type == "dynamic":
        return "has dynamic rotary scaling, which changes old keys as the stream grows"
    return None


def rope_parameters(config: Any) -> dict[str, Any]:
    """The rotary parameters of a configuration, empty if it has none or several sets."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return parameters if "rope_type" in parameters else {}


def refusal_of_capacity(config: Any, capacity: int) -> str | None:
    """Why a cache of `capacity` tokens cannot be exact for this configuration, or None.

    longrope (arXiv:2402.13753) has two sets of factors and picks by length; in-cache positions stay below C, so
    the short ones are right as long as C does not exceed the original length.
    """
    parameters = rope_parameters(config)
    if parameters.get("rope_type") != "longrope":
        return None
    text_config = config.get_text_config()
    original = parameters.get("original_max_position_embeddings") or getattr(
        text_config, "original_max_position_embeddings", None
    )
    if original is not None and capacity > original:
        return f"at most {original}, the length up to which its longrope factors stay the same"
    return None
