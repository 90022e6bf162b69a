"""Tiny random GGUF files, written as llama.cpp's converter writes each architecture.

Nothing here is read from sinkexport: names of keys and tensors, and their shapes, are those that llama.cpp's source
(conversion/*.py, src/models/*.cpp) asks for, and llama.cpp loads every file.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD, FF, CONTEXT = 96, 64, 2, 4, 2, 16, 96, 512
EXPERTS, EXPERT_FF = 4, 32


@dataclasses.dataclass
class Tiny:
    """A file to be: keys without the architecture's name, and tensors, float32 with rows first.

    kinds: tensor -> quantisation, F32 if absent. A tensor of uint8 is quantised already: bytes of each row.
    """

    architecture: str
    keys: dict[str, Any]
    tensors: dict[str, np.ndarray]
    other_keys: dict[str, Any] = dataclasses.field(default_factory=dict)
    kinds: dict[str, str] = dataclasses.field(default_factory=dict)


class _Random:
    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def matrix(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        spread = scale * 1.6 / np.sqrt(shape[-1])
        return (self._generator.standard_normal(shape) * spread).astype(np.float32)

    def vector(self, size: int, around: float = 0.0) -> np.ndarray:
        return (around + 0.3 * self._generator.standard_normal(size)).astype(np.float32)


def tiny(
    architecture: str,
    *,
    seed: int = 0,
    layers: int = LAYERS,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    **options: Any,
) -> Tiny:
    """A random model. keys, tensors: added to or put in the place of the usual ones; None takes one away."""
    made = _MAKERS.get(architecture, _llama_kind)(architecture, _Random(seed), layers, **options)
    made.keys |= {"block_count": layers, "context_length": CONTEXT, "embedding_length": HIDDEN}
    for target, changes in ((made.keys, keys), (made.tensors, tensors)):
        for name, value in (changes or {}).items():
            target.pop(name, None)
            if value is not None:
                target[name] = value
    return made


def write(path: Path, made: Tiny, *, tokens: dict[str, Any] | None = None, split: int = 0) -> Path:
    """Write a file. tokens: further keys of the tokenizer, behind ``tokenizer.ggml.``; None takes one away.

    split: how many tensors go into a part, 0: no parts. Returns the path of the file, or of the first part.
    """
    writer = gguf.GGUFWriter(path, made.architecture, split_max_tensors=split)
    for key, value in made.keys.items():
        _add(writer, f"{made.architecture}.{key}", value)
    for key, value in made.other_keys.items():
        _add(writer, key, value)
    names = ["<unk>", "<s>", "</s>", "<0x0A>", *(f"w{i}" for i in range(4, VOCAB))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(names)
    writer.add_token_scores([-float(i) for i in range(VOCAB)])
    writer.add_token_types([2, 3, 3, 6, *[1] * (VOCAB - 4)])
    named = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, **(tokens or {})}
    for key, value in named.items():
        if value is not None:
            _add(writer, f"tokenizer.ggml.{key}", value)
    for name, values in made.tensors.items():
        kind = gguf.GGMLQuantizationType[made.kinds.get(name, "F32")]
        plain = kind == gguf.GGMLQuantizationType.F32 or values.dtype == np.uint8
        writer.add_tensor(name, values if plain else gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf")) if split else path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _attention_keys(*, rms: bool = True, kv_heads: int = KV_HEADS) -> dict[str, Any]:
    eps = {"attention.layer_norm_rms_epsilon": 1e-5} if rms else {"attention.layer_norm_epsilon": 1e-5}
    return {"feed_forward_length": FF, "attention.head_count": HEADS, "attention.head_count_kv": kv_heads, **eps}


def _outer(random: _Random, *, head: bool = True, norm_bias: bool = False, around: float = 1.0) -> dict[str, Any]:
    tensors = {
        "token_embd.weight": random.matrix(VOCAB, HIDDEN, scale=4.0),
        "output_norm.weight": random.vector(HIDDEN, around),
    }
    if norm_bias:
        tensors["output_norm.bias"] = random.vector(HIDDEN)
    if head:
        tensors["output.weight"] = random.matrix(VOCAB, HIDDEN)
    return tensors


def _llama_kind(
    architecture: str,
    random: _Random,
    layers: int,
    *,
    head: bool = True,
    biases: tuple[str, ...] = (),
    head_norms: bool = False,
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm"),
    rms: bool = True,
    gated: bool = True,
    head_dim: int = HEAD,
    kv_heads: int = KV_HEADS,
    norm_biases: bool = False,
) -> Tiny:
    """Separate projections, gated or plain MLP."""
    tensors = _outer(random, head=head, norm_bias=norm_biases)
    rows = {
        "attn_q": HEADS * head_dim,
        "attn_k": kv_heads * head_dim,
        "attn_v": kv_heads * head_dim,
        "attn_output": HIDDEN,
        "ffn_up": FF,
        "ffn_down": HIDDEN,
    }
    columns = {"attn_output": HEADS * head_dim, "ffn_down": FF}
    if gated:
        rows["ffn_gate"] = FF
    for i in range(layers):
        for name in norms:
            tensors[f"blk.{i}.{name}.weight"] = random.vector(HIDDEN, 1.0)
            if norm_biases:
                tensors[f"blk.{i}.{name}.bias"] = random.vector(HIDDEN)
        for name, count in rows.items():
            scale = 2.0 if name in ("attn_q", "attn_k") else 1.0
            tensors[f"blk.{i}.{name}.weight"] = random.matrix(count, columns.get(name, HIDDEN), scale=scale)
            if name in biases:
                tensors[f"blk.{i}.{name}.bias"] = random.vector(count)
        if head_norms:
            tensors[f"blk.{i}.attn_q_norm.weight"] = random.vector(head_dim, 1.0)
            tensors[f"blk.{i}.attn_k_norm.weight"] = random.vector(head_dim, 1.0)
    keys = _attention_keys(rms=rms, kv_heads=kv_heads)
    if head_dim != HIDDEN // HEADS:
        keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    return Tiny(architecture, keys, tensors)


def _with_experts(architecture: str, random: _Random, layers: int, **options: Any) -> Tiny:
    """Experts in the place of the MLP."""
    made = _llama_kind(architecture, random, layers, **options)
    for i in range(layers):
        for name in ("ffn_gate", "ffn_up", "ffn_down"):
            del made.tensors[f"blk.{i}.{name}.weight"]
        size = FF if architecture == "llama" else EXPERT_FF
        made.tensors |= {
            f"blk.{i}.ffn_gate_inp.weight": random.matrix(EXPERTS, HIDDEN, scale=2.0),
            f"blk.{i}.ffn_gate_exps.weight": random.matrix(EXPERTS, size, HIDDEN),
            f"blk.{i}.ffn_up_exps.weight": random.matrix(EXPERTS, size, HIDDEN),
            f"blk.{i}.ffn_down_exps.weight": random.matrix(EXPERTS, HIDDEN, size),
        }
        if architecture == "qwen2moe":
            made.tensors |= {
                f"blk.{i}.ffn_gate_inp_shexp.weight": random.vector(HIDDEN),
                f"blk.{i}.ffn_gate_shexp.weight": random.matrix(FF, HIDDEN),
                f"blk.{i}.ffn_up_shexp.weight": random.matrix(FF, HIDDEN),
                f"blk.{i}.ffn_down_shexp.weight": random.matrix(HIDDEN, FF),
            }
    made.keys |= {"expert_count": EXPERTS, "expert_used_count": 2}
    if architecture != "llama":
        made.keys["expert_feed_forward_length"] = EXPERT_FF
    if architecture == "qwen2moe":
        made.keys["expert_shared_feed_forward_length"] = FF
    return made


def _minimax(architecture: str, random: _Random, layers: int) -> Tiny:
    made = _with_experts(architecture, random, layers)
    for i in range(layers):
        made.tensors[f"blk.{i}.attn_q_norm.weight"] = random.vector(HEADS * HEAD, 1.0)
        made.tensors[f"blk.{i}.attn_k_norm.weight"] = random.vector(KV_HEADS * HEAD, 1.0)
        made.tensors[f"blk.{i}.exp_probs_b.bias"] = random.vector(EXPERTS)
        # llama.cpp takes the experts' size from the other key too
    made.keys |= {"expert_gating_func": 2, "rope.dimension_count": HEAD // 2, "feed_forward_length": EXPERT_FF}
    return made


def _gpt_oss(architecture: str, random: _Random, layers: int) -> Tiny:
    made = _with_experts(
        architecture,
        random,
        layers,
        norms=("attn_norm", "post_attention_norm"),
        kv_heads=KV_HEADS,
        biases=("attn_q", "attn_k", "attn_v", "attn_output"),
    )
    for i in range(layers):
        made.tensors |= {
            f"blk.{i}.attn_sinks.weight": random.vector(HEADS, 1.0),
            f"blk.{i}.ffn_gate_inp.bias": random.vector(EXPERTS),
            f"blk.{i}.ffn_gate_exps.bias": random.matrix(EXPERTS, EXPERT_FF),
            f"blk.{i}.ffn_up_exps.bias": random.matrix(EXPERTS, EXPERT_FF),
            f"blk.{i}.ffn_down_exps.bias": random.matrix(EXPERTS, HIDDEN),
        }
    # The bounds of YaRN are clamped, so that whole pairs or not is the same: see experts.gpt_oss.
    made.keys |= {
        "attention.sliding_window": 6,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 8.0,
        "rope.scaling.original_context_length": 16,
        "rope.freq_base": 1.5,
    }
    return made


def _stablelm(architecture: str, random: _Random, layers: int, *, parallel: bool = False) -> Tiny:
    norms = ("attn_norm",) if parallel else ("attn_norm", "ffn_norm")
    made = _llama_kind(
        architecture,
        random,
        layers,
        norms=norms,
        rms=False,
        norm_biases=True,
        biases=() if parallel else ("attn_q", "attn_k", "attn_v"),
    )
    if parallel:
        for i in range(layers):
            made.tensors[f"blk.{i}.attn_q_norm.weight"] = random.matrix(HEADS, HEAD, scale=0.5) + 1.0
            made.tensors[f"blk.{i}.attn_k_norm.weight"] = random.matrix(KV_HEADS, HEAD, scale=0.5) + 1.0
    made.keys |= {"use_parallel_residual": parallel, "rope.dimension_count": 4}
    return made


def _plain_mlp(architecture: str, random: _Random, layers: int, **options: Any) -> Tiny:
    """Layer norms, biases everywhere, no gate: StarCoder2, Phi-2, Nemotron."""
    every = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down")
    made = _llama_kind(
        architecture,
        random,
        layers,
        gated=False,
        rms=False,
        norm_biases=True,
        **{
            "biases": every,
            "kv_heads": HEADS if architecture == "phi2" else KV_HEADS,
            "norms": ("attn_norm",) if architecture == "phi2" else ("attn_norm", "ffn_norm"),
            **options,
        },
    )
    if architecture == "phi2":
        made.tensors["output.bias"] = random.vector(VOCAB)
    return made


def _phi3(architecture: str, random: _Random, layers: int, *, head: bool = True) -> Tiny:
    tensors = _outer(random, head=head)
    for i in range(layers):
        tensors |= {
            f"blk.{i}.attn_norm.weight": random.vector(HIDDEN, 1.0),
            f"blk.{i}.ffn_norm.weight": random.vector(HIDDEN, 1.0),
            f"blk.{i}.attn_qkv.weight": random.matrix((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN, scale=1.5),
            f"blk.{i}.attn_output.weight": random.matrix(HIDDEN, HIDDEN),
            f"blk.{i}.ffn_up.weight": random.matrix(2 * FF, HIDDEN),
            f"blk.{i}.ffn_down.weight": random.matrix(HIDDEN, FF),
        }
    return Tiny(architecture, _attention_keys() | {"rope.dimension_count": HEAD}, tensors)


def _gemma(architecture: str, random: _Random, layers: int) -> Tiny:
    norms = {"gemma": ("attn_norm", "ffn_norm")}.get(
        architecture, ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    )
    made = _llama_kind(
        architecture, random, layers, head=False, norms=norms, head_dim=32, head_norms=architecture == "gemma3"
    )
    made.tensors["token_embd.weight"] *= 0.4
    if architecture != "gemma":
        made.keys["attention.sliding_window"] = 5
    return made


def _glm4(architecture: str, random: _Random, layers: int) -> Tiny:
    made = _llama_kind(
        architecture,
        random,
        layers,
        gated=False,
        biases=("attn_q", "attn_k", "attn_v"),
        norms=("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"),
    )
    for i in range(layers):
        made.tensors[f"blk.{i}.ffn_up.weight"] = random.matrix(2 * FF, HIDDEN)
    made.keys["rope.dimension_count"] = HEAD // 2
    return made


def _fused(
    architecture: str,
    random: _Random,
    layers: int,
    *,
    kv_heads: int = HEADS,
    biases: bool = True,
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm"),
    head: bool = True,
) -> Tiny:
    """One matrix of queries, keys and values; MLP of four times the columns."""
    tensors = _outer(random, head=head, norm_bias=architecture != "mpt")
    modules = {
        "attn_qkv": ((HEADS + 2 * kv_heads) * HEAD, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_up": (4 * HIDDEN, HIDDEN),
        "ffn_down": (HIDDEN, 4 * HIDDEN),
    }
    if architecture == "bloom":
        tensors |= {"token_embd_norm.weight": random.vector(HIDDEN, 1.0), "token_embd_norm.bias": random.vector(HIDDEN)}
    for i in range(layers):
        for name in norms:
            tensors[f"blk.{i}.{name}.weight"] = random.vector(HIDDEN, 1.0)
            if architecture != "mpt":
                tensors[f"blk.{i}.{name}.bias"] = random.vector(HIDDEN)
        for name, shape in modules.items():
            tensors[f"blk.{i}.{name}.weight"] = random.matrix(*shape, scale=1.5 if name == "attn_qkv" else 1.0)
            if biases:
                tensors[f"blk.{i}.{name}.bias"] = random.vector(shape[0])
    keys = _attention_keys(rms=False, kv_heads=kv_heads) | {"feed_forward_length": 4 * HIDDEN}
    if architecture == "mpt":
        keys |= {"attention.max_alibi_bias": 8.0}
    if architecture == "gptneox":
        keys |= {"use_parallel_residual": True, "rope.dimension_count": HEAD // 4}
    return Tiny(architecture, keys, tensors)


def _olmo(architecture: str, random: _Random, layers: int) -> Tiny:
    made = _llama_kind(architecture, random, layers, norms=(), rms=False)
    del made.tensors["output_norm.weight"]
    return made


def _olmo2(architecture: str, random: _Random, layers: int) -> Tiny:
    made = _llama_kind(architecture, random, layers, norms=("post_attention_norm", "post_ffw_norm"))
    for i in range(layers):
        made.tensors[f"blk.{i}.attn_q_norm.weight"] = random.vector(HEADS * HEAD, 1.0)
        made.tensors[f"blk.{i}.attn_k_norm.weight"] = random.vector(KV_HEADS * HEAD, 1.0)
    return made


def _cohere(architecture: str, random: _Random, layers: int) -> Tiny:
    made = _llama_kind(architecture, random, layers, norms=("attn_norm",), rms=False, head=False)
    made.keys |= {"logit_scale": 0.25, "rope.scaling.type": "none"}
    if layers >= 64:  # where llama.cpp asks for them: Command R Plus
        for i in range(layers):
            made.tensors[f"blk.{i}.attn_q_norm.weight"] = random.matrix(HEADS, HEAD, scale=0.5) + 1.0
            made.tensors[f"blk.{i}.attn_k_norm.weight"] = random.matrix(KV_HEADS, HEAD, scale=0.5) + 1.0
    if architecture == "cohere2":
        made.keys |= {"attention.sliding_window": 5, "rope.dimension_count": HEAD}
    return made


def tiny_quantised(kind: gguf.GGMLQuantizationType, *, seed: int = 0) -> Tiny:
    """A Llama of one layer and 256 columns, a row that every type can hold, whose embedding is random blocks of `kind`.

    llama.cpp dequantises rows of the embedding exactly, where it rounds what a quantised matrix is multiplied with.
    """
    random, hidden = _Random(seed), 256
    rows = {
        "attn_q": hidden,
        "attn_k": hidden,
        "attn_v": hidden,
        "attn_output": hidden,
        "ffn_gate": 32,
        "ffn_up": 32,
        "ffn_down": hidden,
    }
    tensors = {"output_norm.weight": random.vector(hidden, 1.0), "output.weight": random.matrix(VOCAB, hidden)}
    for name in ("attn_norm", "ffn_norm"):
        tensors[f"blk.0.{name}.weight"] = random.vector(hidden, 1.0)
    for name, count in rows.items():
        tensors[f"blk.0.{name}.weight"] = random.matrix(count, 32 if name == "ffn_down" else hidden)
    tensors["token_embd.weight"] = _random_blocks(kind, VOCAB, hidden, seed)
    keys = _attention_keys(kv_heads=HEADS) | {
        "feed_forward_length": 32,
        "block_count": 1,
        "context_length": CONTEXT,
        "embedding_length": hidden,
    }
    return Tiny("llama", keys, tensors, kinds={"token_embd.weight": kind.name})


def _random_blocks(kind: gguf.GGMLQuantizationType, rows: int, columns: int, seed: int) -> np.ndarray:
    """Random bytes, anew where they stand for values that are not of usual size: uint8 [rows, bytes of a row]."""
    generator = np.random.default_rng(seed)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    count = rows * columns // block
    blocks = generator.integers(0, 256, (count, block_bytes), dtype=np.uint8)
    for _ in range(2000):
        with np.errstate(all="ignore"):
            largest = np.abs(gguf.dequantize(blocks, kind).astype(np.float64)).max(axis=-1)
        bad = ~((largest > 1e-2) & (largest < 1e2))
        if not bad.any():
            return blocks.reshape(rows, -1)
        blocks[bad] = generator.integers(0, 256, (int(bad.sum()), block_bytes), dtype=np.uint8)
    raise AssertionError(f"no usual blocks of {kind.name}")


_MAKERS: dict[str, Any] = {
    "gpt-oss": _gpt_oss,
    "minimax-m2": _minimax,
    "qwen2moe": _with_experts,
    "qwen3moe": _with_experts,
    "stablelm": _stablelm,
    "starcoder2": _plain_mlp,
    "phi2": _plain_mlp,
    "nemotron": _plain_mlp,
    "phi3": _phi3,
    "gemma": _gemma,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "glm4": _glm4,
    "falcon": _fused,
    "bloom": _fused,
    "mpt": _fused,
    "gptneox": _fused,
    "olmo": _olmo,
    "olmo2": _olmo2,
    "command-r": _cohere,
    "cohere2": _cohere,
}


def tiny_mixtral(**changes: Any) -> Tiny:
    """Experts under the name ``llama``, as llama.cpp's converter writes Mixtral."""
    layers, seed = changes.pop("layers", LAYERS), changes.pop("seed", 0)
    made = _with_experts("llama", _Random(seed), layers)
    made.keys |= {"block_count": layers, "context_length": CONTEXT, "embedding_length": HIDDEN, **changes}
    return made
