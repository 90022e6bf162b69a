"""Model families that export, and the reasons why others are refused. Importable without torch.

Export itself is generic: a model is probed and traced, and refused if anything about it is not understood. The
rows here say what to expect; a family that is not listed is tried all the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
    """One line of ``sinkexport inspect families`` and of README's table.

    family: transformers' model_type. examples: models that people know. positions: how it encodes them.
    layers: what its attention layers see, as ``sliding + full`` or ``full``, and what else is special about them.
    exact: whether exported bundles equal the definition; `reason`: a remark, or why the family is refused.
    tested_by: the tiny models of the test suite that say so: dense transformers before the cache is full, and the
    streaming reference over six wraps of the window, batched, in steps and in chunks.
    """

    family: str
    examples: str
    positions: str
    layers: str = "full"
    exact: bool = True
    reason: str = ""
    tested_by: tuple[str, ...] = ()


def _exported(
    family: str, examples: str, positions: str, layers: str = "full", reason: str = "", also: tuple[str, ...] = ()
) -> Family:
    """A family with a tiny model of its own name; also: further ones."""
    return Family(family, examples, positions, layers, True, reason, (family, *also))


SLIDING = "sliding or full"
"""Layers whose sliding window is smaller than S + W keep it, exactly and without sinks; the others keep S + W."""

_MLA = "latent attention (MLA): the latent is cached"
_INDEXED = "indexed: full while S + W are all chosen"
"""Layers whose indexer chooses the tokens that they see. A larger cache than what it chooses is refused."""

EXPORTED = (
    _exported(
        "llama",
        "Llama 1-3, SmolLM, SmolLM2, TinyLlama, Yi",
        "RoPE; linear, llama3, YaRN, dynamic NTK",
        also=("llama-tied", "llama-mha", "llama3-rope", "llama-linear-rope", "llama-yarn"),
    ),
    _exported("mistral", "Mistral 7B, Ministral", "RoPE", SLIDING),
    _exported("qwen2", "Qwen2, Qwen2.5", "RoPE", SLIDING),
    _exported("qwen3", "Qwen3", "RoPE", SLIDING, "norms on queries and keys"),
    _exported("phi", "Phi-1.5, Phi-2", "RoPE, partial"),
    _exported(
        "phi3", "Phi-3, Phi-3.5, Phi-4", "RoPE, partial in Phi-4-mini; longrope", SLIDING, also=("phi3-partial",)
    ),
    _exported("gpt_neox", "Pythia, GPT-NeoX-20B", "RoPE, partial", reason="parallel residual"),
    _exported("olmo", "OLMo", "RoPE"),
    _exported("olmo2", "OLMo 2", "RoPE", reason="norms on queries and keys"),
    _exported("stablelm", "StableLM 2, StableLM 3B", "RoPE, partial"),
    _exported("granite", "Granite 3", "RoPE", reason="logit, residual and attention multipliers"),
    _exported("smollm3", "SmolLM3", "RoPE, none in every fourth layer"),
    _exported("starcoder2", "StarCoder2", "RoPE", SLIDING),
    _exported("cohere", "Command R", "RoPE, interleaved"),
    _exported("cohere2", "Command R7B", "RoPE, interleaved, in sliding layers; none in full ones", "sliding + full"),
    _exported("glm", "GLM-4 9B", "RoPE, partial and interleaved"),
    _exported("gemma", "Gemma 1", "RoPE"),
    _exported("gemma2", "Gemma 2", "RoPE", "sliding + full", "softcap"),
    _exported("gemma3_text", "Gemma 3", "RoPE, two bases", "sliding + full", "norms on queries and keys"),
    _exported(
        "gpt_oss",
        "gpt-oss 20B, 120B",
        "RoPE, YaRN",
        "sliding + full",
        "MoE; learned sink logits beside the kept sinks; weights must not be MXFP4 any more",
    ),
    _exported("mixtral", "Mixtral", "RoPE", SLIDING, "MoE"),
    _exported("qwen3_moe", "Qwen3 30B-A3B, 235B-A22B", "RoPE", SLIDING, "MoE; norms on queries and keys"),
    _exported(
        "qwen3_next",
        "Qwen3-Next 80B-A3B",
        "RoPE, partial",
        "linear + full",
        "gated attention and delta rule; MoE",
    ),
    _exported("qwen3_5_text", "Qwen3.5, text", "RoPE, partial", "linear + full", "gated attention and delta rule"),
    _exported("lfm2", "LFM2 350M-2.6B", "RoPE", "convolution + full", "short convolutions"),
    _exported("lfm2_moe", "LFM2 8B-A1B", "RoPE", "convolution + full", "short convolutions; MoE"),
    _exported("lfm3", "LFM3", "RoPE, two bases", "convolution + sliding + full", "short convolutions"),
    _exported("nemotron_h", "Nemotron-H, Nemotron 3 Nano", "none", "Mamba-2 + full", "layers without attention"),
    _exported("granitemoehybrid", "Granite 4 hybrid", "none, or RoPE", "Mamba-2 + full", "MoE"),
    _exported("bamba", "Bamba 9B", "RoPE, partial", "Mamba-2 + full"),
    _exported("falcon_h1", "Falcon-H1", "RoPE", "Mamba-2 and full in each", "attention beside Mamba-2 in each layer"),
    _exported("zamba2", "Zamba2", "RoPE, or none", "Mamba-2 + full", "layers that share an attention block"),
    _exported("mamba2", "Mamba-2, Codestral Mamba", "none", "Mamba-2", "no attention: S and W mean nothing"),
    _exported("jamba", "Jamba 1.5, Jamba Reasoning", "none", "Mamba + full", "MoE"),
    _exported("zamba", "Zamba 7B", "none", "Mamba + full", "layers that share an attention block"),
    _exported("mamba", "Mamba", "none", "Mamba", "no attention: S and W mean nothing"),
    _exported("falcon_mamba", "Falcon Mamba 7B", "none", "Mamba", "no attention: S and W mean nothing"),
    _exported("olmo_hybrid", "OLMo hybrid", "none, or RoPE", "linear + full", "gated delta rule"),
    _exported(
        "qwen4_exp_text",
        "Qwen4 exp, text",
        "RoPE, partial",
        "linear + full",
        "gated delta rule; indexers where they choose all of S + W; without hashed n-grams; MoE",
    ),
    _exported("kimi_linear", "Kimi Linear 48B-A3B", "none", "linear + full", "Kimi delta attention; latent cache; MoE"),
    _exported("bailing_hybrid", "Ling 3.0 Flash", "RoPE", "linear + full", "Kimi delta attention; latent cache; MoE"),
    _exported("minimax", "MiniMax-Text-01", "RoPE", "linear + full", "lightning attention; MoE"),
    _exported("recurrent_gemma", "RecurrentGemma 2B, 9B", "RoPE, partial", "RG-LRU + sliding", "short convolutions"),
    _exported("zaya", "Zaya1 8B", "RoPE, partial", SLIDING, "convolutions of queries, keys and values; MoE"),
    _exported("rwkv", "RWKV-4", "none", "RWKV", "no attention: S and W mean nothing"),
    _exported("xlstm", "xLSTM 7B", "none", "mLSTM", "no attention: S and W mean nothing"),
    _exported(
        "laguna", "Laguna", "RoPE, two bases", "sliding + full", "MoE; as many query heads as each layer wants; gated"
    ),
    _exported(
        "mimo_v2_flash",
        "MiMo-V2-Flash",
        "RoPE, two bases; partial",
        "sliding + full",
        "MoE; values smaller than keys, as many heads as each kind of layer wants; learned sink logits",
    ),
    _exported("deepseek_v2", "DeepSeek V2, V2 Lite", "RoPE, YaRN", reason=f"{_MLA}; MoE"),
    _exported(
        "deepseek_v3", "DeepSeek V3, R1, Kimi K2", "RoPE, YaRN", reason=f"{_MLA}; MoE", also=("deepseek_v3-yarn",)
    ),
    _exported("minicpm3", "MiniCPM3 4B", "RoPE", reason=_MLA),
    _exported("glm4_moe_lite", "GLM-4.7 Flash", "RoPE", reason=f"{_MLA}; MoE"),
    _exported("youtu", "Youtu-LLM 2B", "RoPE", reason=_MLA),
    _exported("longcat_flash", "LongCat Flash", "RoPE", reason=f"{_MLA}, twice in a layer; MoE"),
    _exported("axk1", "A.X K1", "RoPE, YaRN", reason=f"{_MLA}; MoE"),
    _exported("gpt_neox_japanese", "GPT-NeoX Japanese", "RoPE, partial"),
    _exported("dbrx", "DBRX", "RoPE", reason="MoE; clipped queries, keys and values"),
    _exported("jetmoe", "JetMoE", "RoPE", reason="MoE, in the attention too: experts make queries for the same keys"),
    _exported(
        "gemma3n_text",
        "Gemma 3n, text",
        "RoPE, two bases",
        "sliding + full",
        "layers that share a cache; per-layer inputs; sparse activations",
    ),
    _exported(
        "gemma4_text",
        "Gemma 4, text",
        "RoPE, two bases; partial",
        "sliding + full",
        "layers that share a cache; heads of two sizes; per-layer inputs",
    ),
    _exported("doge", "Doge", "RoPE", "full while S + W are all kept", "a bias of each key; dynamic mask left out"),
    _exported("modernbert-decoder", "ModernBERT decoders, Ettin", "RoPE, two bases", "sliding + full"),
    _exported("minimax_m3_vl_text", "MiniMax M3, text", "RoPE, partial", _INDEXED, "MoE; norms on queries and keys"),
    _exported("deepseek_v32", "DeepSeek V3.2", "RoPE, interleaved", _INDEXED, f"{_MLA}; MoE"),
    _exported("glm_moe_dsa", "GLM-5", "RoPE, interleaved", _INDEXED, f"{_MLA}; MoE"),
    _exported("diffllama", "DiffLlama", "RoPE", reason="two calls of attention in each layer"),
    _exported("hrm_text", "HRM, text", "RoPE", reason="runs through its layers again and again"),
    _exported("gptj", "GPT-J 6B", "RoPE, partial and interleaved", reason="parallel residual"),
    _exported("codegen", "CodeGen", "RoPE, partial and interleaved", reason="parallel residual"),
    _exported("nanochat", "nanochat", "RoPE, turned the other way", reason="norms without weights after RoPE"),
    _exported("hunyuan_v1_dense", "Hunyuan 0.5B-7B", "RoPE", reason="norms with weights after RoPE"),
    _exported("hunyuan_v1_moe", "Hunyuan A13B", "RoPE", reason="MoE; norms with weights after RoPE"),
    _exported("ministral3", "Ministral 3", "RoPE, YaRN; queries scaled by in-cache position", SLIDING),
    _exported(
        "llama4_text",
        "Llama 4, text",
        "RoPE of complex numbers; none and queries scaled by in-cache position in every fourth layer",
        reason="MoE; S + W at most attention_chunk_size",
    ),
    _exported("granite_swa", "Granite, sliding", "RoPE, or none, with a base for each layer", "sliding + full"),
    _exported("granitemoe_swa", "Granite MoE, sliding", "RoPE, or none, with a base for each layer", "sliding + full"),
    _exported("moshi", "Moshi, its text model", "RoPE, an embedding in each layer"),
    _exported("bloom", "BLOOM, BLOOMZ", "ALiBi"),
    _exported("mpt", "MPT", "ALiBi", reason="clipped queries, keys and values"),
    _exported(
        "falcon",
        "Falcon 7B-180B, Falcon-RW",
        "RoPE, or ALiBi in Falcon-RW",
        reason="one key head or groups; ALiBi by distance, where transformers rounds slope * place to bfloat16",
        also=("falcon-groups", "falcon-alibi"),
    ),
)

_ABSOLUTE = "learns a vector for each absolute position"
_SINES = "adds a vector of sines for each absolute position"
_ENCODER = "is an encoder, or a decoder with a vector for each absolute position"


def _refused(names: str, reason: str, positions: str, layers: str = "full") -> tuple[Family, ...]:
    """Families by transformers' names, in a row, and what people call them."""
    pairs = (name.split("=") for name in names.split("; "))
    return tuple(Family(name, example, positions, layers, False, reason) for name, example in pairs)


REFUSED = (
    *_refused("gpt2=GPT-2; opt=OPT; gpt_bigcode=StarCoder", _ABSOLUTE, "learned absolute"),
    *_refused("gpt_neo=GPT-Neo", _ABSOLUTE, "learned absolute", "sliding + full"),
    *_refused("openai-gpt=GPT; biogpt=BioGPT; git=GIT", _ABSOLUTE, "learned absolute"),
    *_refused(
        "ctrl=CTRL; xglm=XGLM; musicgen_decoder=MusicGen; musicgen_melody_decoder=MusicGen Melody",
        _SINES,
        "sinusoidal absolute",
    ),
    *_refused("xlm=XLM", "adds or learns a vector for each absolute position", "absolute"),
    *_refused(
        "inkling_text=Inkling, text; inkling2_text=Inkling 2, text",
        "adds to each logit what a query makes of the distance",
        "relative, by query",
        "sliding + full",
    ),
    *_refused("cpmant=CPM-Ant", "has a learned bias for each distance", "relative bias"),
    *_refused("xlnet=XLNet", "predicts tokens in permuted orders, with relative positions", "relative"),
    *_refused("reformer=Reformer", "attends within hash buckets, with axial positions", "axial", "hashed"),
    *_refused(
        "deepseek_v4=DeepSeek V4",
        "attends to compressed blocks of earlier tokens beside a sliding window",
        "RoPE, of blocks too",
        "sliding + compressed",
    ),
    *_refused("blt=BLT", "cuts text into patches of bytes by a second model", "RoPE", "patches"),
    *_refused(
        "bert=BERT; bert-generation=BERT Generation; big_bird=BigBird; camembert=CamemBERT; data2vec-text=Data2Vec; "
        "electra=ELECTRA; ernie=ERNIE; megatron-bert=Megatron-BERT; rembert=RemBERT; roberta=RoBERTa; "
        "roberta-prelayernorm=RoBERTa PreLayerNorm; roc_bert=RoCBert; xlm-roberta=XLM-RoBERTa; "
        "xlm-roberta-xl=XLM-RoBERTa-XL; xmod=X-MOD",
        _ENCODER,
        "learned absolute",
    ),
    *_refused("roformer=RoFormer", "is an encoder", "RoPE"),
    *_refused("t5=T5", "is an encoder-decoder", "relative bias"),
    *_refused(
        "bart=BART; bigbird_pegasus=BigBird-Pegasus; blenderbot=Blenderbot; blenderbot-small=Blenderbot Small; "
        "mbart=mBART; mvp=MVP; plbart=PLBart; prophetnet=ProphetNet; trocr=TrOCR; whisper=Whisper",
        "is an encoder-decoder, or its decoder, and learns a vector for each absolute position",
        "learned absolute",
    ),
    *_refused(
        "marian=Marian; pegasus=Pegasus",
        "is an encoder-decoder, or its decoder, and adds a vector of sines for each absolute position",
        "sinusoidal absolute",
    ),
    *_refused(
        "gemma4_assistant=Gemma 4 assistants; gemma4_unified_assistant=Gemma 4 assistants",
        "drafts for another model, whose keys and values it reads",
        "RoPE",
    ),
)


def describe() -> list[Family]:
    """Every family that is known: exported ones first."""
    return [*EXPORTED, *REFUSED]


def markdown_table() -> str:
    """README's table of families."""
    rows = [("family", "models", "positions", "layers", "exact", "remark", "tested by"), ("---",) * 7]
    for family in describe():
        tested = ", ".join(f"`{name}`" for name in family.tested_by)
        name, exact = f"`{family.family}`", "yes" if family.exact else "refused"
        facts = (family.examples, family.positions, family.layers)
        rows.append((name, *facts, exact, family.reason or "-", tested or "-"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def refusal_of_config(config: Any) -> str | None:
    """Reason why a transformers configuration rules out an exact export, or None if it does not.

    Reads the configuration only, so that a refusal comes before the weights are loaded.
    """
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder-decoder"
    for family in REFUSED:
        if config.model_type == family.family:
            return family.reason
    if getattr(config, "ple_layer_ids", None):
        return "looks hashed n-grams up (ple_layer_ids)"
    if config.model_type == "doge" and config.is_moe:
        return "chooses the experts of a token by other tokens of the text as well (is_moe)"
    quantization = getattr(config, "quantization_config", None)
    method = (
        quantization.get("quant_method")
        if isinstance(quantization, dict)
        else getattr(quantization, "quant_method", None)
    )
    if quantization is not None and str(getattr(method, "value", method)) != "gguf":
        return f"has weights quantized by {method}: export the original floating-point model"
    return None


def rotates_by_length(config: Any, capacity: int) -> bool:
    """Whether transformers would rotate a text as long as a full cache otherwise than a shorter one.

    longrope (arXiv:2402.13753) has a set of factors for texts up to the original length and one for longer ones;
    dynamic NTK scaling changes with each token beyond it. A bundle has the frequencies of a text of `capacity` tokens
    from its first token on: those that every token sees once the cache is full.
    """
    text_config = config.get_text_config()
    parameters = getattr(text_config, "rope_parameters", None) or {}
    for one in [parameters] if "rope_type" in parameters else [p for p in parameters.values() if p]:
        if one["rope_type"] == "longrope":
            original = one.get("original_max_position_embeddings") or getattr(
                text_config, "original_max_position_embeddings", None
            )
            if one.get("short_factor") == one.get("long_factor"):
                continue  # factors for any length, which GGUF files have as a tensor
            if original is not None and capacity > original:
                return True
        elif one["rope_type"] == "dynamic" and capacity > text_config.max_position_embeddings:
            return True
    return False
