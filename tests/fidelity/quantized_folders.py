"""Folders of tiny quantised models, packed number by number as the formats' papers and libraries describe them.

Nothing here is read from sinkexport. Fields are put into words with Python's integers, one after the other.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.torch
import torch
import transformers

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, VOCAB = 64, 128, 4, 2, 96
NEVER = ("embed_tokens", "lm_head", "gate", "router")
"""Modules that no program quantises by itself: tables, and what chooses experts."""

AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Outputs in the fields of a word, the lowest field first."""

Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass
class Folder:
    """A folder on the disk. weights: what every quantised tensor of the model stands for, float32."""

    path: Path
    weights: dict[str, np.ndarray]
    tensors: Tensors
    config: dict[str, Any]
    floats: frozenset[str]
    """Names of tensors that are not quantised."""

    def write(self) -> Path:
        """Write it, again after a change."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.json").write_text(json.dumps(self.config))
        safetensors.torch.save_file(
            {name: tensor.contiguous() for name, tensor in self.tensors.items()},
            self.path / "model.safetensors",
            metadata={"format": "pt"},
        )
        return self.path

    def reference(self) -> Any:
        """transformers' model from a folder with the numbers that the tensors stand for, in float32."""
        folder = self.path.with_name(f"{self.path.name}-float")
        folder.mkdir(exist_ok=True)
        plain = {key: value for key, value in self.config.items() if key != "quantization_config"}
        (folder / "config.json").write_text(json.dumps(plain))
        tensors = {name: tensor.float() for name, tensor in self.tensors.items() if name in self.floats}
        tensors |= {name: torch.from_numpy(values.copy()) for name, values in self.weights.items()}
        safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


Pack = Callable[[str, tuple[int, int], np.random.Generator], tuple[Tensors, np.ndarray]]
"""Base name and shape [N, K] -> tensors, and what they stand for."""


def quantized_folder(
    path: Path,
    pack: Pack,
    quantization: dict[str, Any],
    *,
    also: tuple[str, ...] = (),
    never: bool = False,
    seed: int = 0,
    layers: int = 2,
    **config: Any,
) -> Folder:
    """A model, a Llama by default, whose projections are quantised by `pack`, and the modules that `also` names.

    never: none is.
    """
    torch.manual_seed(seed)
    arguments = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    } | config
    kind = arguments.pop("model_type", "llama")
    made = transformers.AutoConfig.for_model(kind, **arguments)
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    random = np.random.default_rng(seed)
    tensors: Tensors = {}
    weights: dict[str, np.ndarray] = {}
    floats = set()
    with tempfile.TemporaryDirectory() as saved:  # experts have a tensor each in files
        model.save_pretrained(saved)
        plain = safetensors.torch.load_file(Path(saved) / "model.safetensors")
    for name, tensor in plain.items():
        base = name.removesuffix(".weight")
        if not never and tensor.ndim == 2 and base != name and (base.rsplit(".", 1)[-1] not in NEVER or base in also):
            packed, weights[name] = pack(base, tuple(tensor.shape), random)
            tensors |= packed
        else:
            tensors[name] = tensor
            floats.add(name)
    facts = {**json.loads(made.to_json_string()), "quantization_config": quantization}
    folder = Folder(path, weights, tensors, facts, frozenset(floats))
    folder.write()
    return folder


def in_words(fields: np.ndarray, bits: int) -> np.ndarray:
    """int32 [n, m * bits / 32] of fields [n, m], the lowest bits first, fields of 3 bits across words."""
    rows = []
    for row in fields.tolist():
        whole = sum(int(field) << (bits * place) for place, field in enumerate(row))
        count = -(-len(row) * bits // 32)
        rows.append([whole >> (32 * word) & 0xFFFFFFFF for word in range(count)])
    return np.array(rows, np.uint32).view(np.int32)


def scales_of(random: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float16) -> np.ndarray:
    """Positive scales as `dtype` holds them, float32."""
    return (random.uniform(0.5, 1.5, shape) * 0.01).astype(dtype).astype(np.float32)


def gptq(
    bits: int = 4,
    group_size: int = 32,
    *,
    sym: bool = False,
    version: str = "gptq",
    order: str = "none",
    dtype: torch.dtype = torch.float16,
) -> tuple[Pack, dict[str, Any]]:
    """GPTQ. order: of the inputs' groups: ``none``, ``shared`` (by all matrices of one size), ``own``, ``uneven``."""

    def pack(base: str, shape: tuple[int, int], random: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        width, depth = shape
        block = depth if group_size == -1 else group_size
        groups = -(-depth // block)
        codes = random.integers(0, 2**bits, (width, depth))
        half = 2 ** (bits - 1)
        zeros = np.full((groups, width), half) if sym else random.integers(1, 2**bits, (groups, width))
        scales = scales_of(random, (groups, width)) * np.float32(2.0 ** (4 - bits))
        scales = torch.from_numpy(scales).to(dtype).float().numpy()
        group = np.arange(depth) // block
        if order != "none":
            shuffle = np.random.default_rng(depth) if order == "shared" else random
            group = shuffle.permutation(group)
        if order == "uneven":
            group[:] = random.integers(0, groups, depth)
        values = (codes - zeros[group].T).astype(np.float32) * scales[group].T
        stored = zeros - 1 if version == "gptq" else zeros
        tensors = {
            f"{base}.qweight": torch.from_numpy(in_words(codes, bits).T.copy()),
            f"{base}.qzeros": torch.from_numpy(in_words(stored, bits)),
            f"{base}.scales": torch.from_numpy(scales).to(dtype),
            f"{base}.g_idx": torch.from_numpy(group.astype(np.int32)),
        }
        return tensors, values.astype(np.float32)

    facts = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": order != "none", "sym": sym}
    return pack, {**facts, "checkpoint_format": version, "damp_percent": 0.01}


def awq(group_size: int = 32) -> tuple[Pack, dict[str, Any]]:
    """AutoAWQ, layout gemm."""

    def pack(base: str, shape: tuple[int, int], random: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        width, depth = shape
        block = depth if group_size == -1 else group_size
        codes = random.integers(0, 16, (depth, width))
        zeros = random.integers(0, 16, (depth // block, width))
        scales = scales_of(random, (depth // block, width))
        values = (codes - np.repeat(zeros, block, axis=0)) * np.repeat(scales, block, axis=0)
        places = [8 * word + output for word in range(width // 8) for output in AWQ_OUTPUTS]
        tensors = {
            f"{base}.qweight": torch.from_numpy(in_words(codes[:, places], 4)),
            f"{base}.qzeros": torch.from_numpy(in_words(zeros[:, places], 4)),
            f"{base}.scales": torch.from_numpy(scales).half(),
        }
        return tensors, values.T.astype(np.float32)

    facts = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return pack, {**facts, "modules_to_not_convert": None}


def packed(
    bits: int = 4, group_size: int | None = 32, *, symmetric: bool = True, dtype: torch.dtype = torch.bfloat16
) -> tuple[Pack, dict[str, Any]]:
    """compressed-tensors' pack-quantized. group_size: None: a scale for each output."""
    half = 2 ** (bits - 1)

    def pack(base: str, shape: tuple[int, int], random: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        width, depth = shape
        block = group_size or depth
        codes = random.integers(0, 2**bits, (width, depth))
        zeros = np.full((width, depth // block), half)
        if not symmetric:
            zeros = random.integers(0, 2**bits, zeros.shape)
        scales = torch.from_numpy(scales_of(random, zeros.shape) * 2.0 ** (4 - bits)).to(dtype)
        values = (codes - np.repeat(zeros, block, axis=1)) * np.repeat(scales.float().numpy(), block, axis=1)
        tensors = {
            f"{base}.weight_packed": torch.from_numpy(in_words(codes, bits)),
            f"{base}.weight_scale": scales,
            f"{base}.weight_shape": torch.tensor(shape),
        }
        if not symmetric:
            tensors[f"{base}.weight_zero_point"] = torch.from_numpy(in_words(zeros.T, bits).T.copy())
        return tensors, values.astype(np.float32)

    return pack, compressed_facts("pack-quantized", bits, group_size, symmetric=symmetric)


def int8(*, symmetric: bool = True, per_tensor: bool = False) -> tuple[Pack, dict[str, Any]]:
    """compressed-tensors' int-quantized, with inputs in 8 bits."""

    def pack(base: str, shape: tuple[int, int], random: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        rows = 1 if per_tensor else shape[0]
        codes = random.integers(-128, 128, shape)
        zeros = np.zeros((rows, 1), int) if symmetric else random.integers(-20, 20, (rows, 1))
        scales = torch.from_numpy(scales_of(random, (rows, 1)) / 16).bfloat16()
        values = (codes - zeros) * scales.float().numpy()
        tensors = {
            f"{base}.weight": torch.from_numpy(codes.astype(np.int8)),
            f"{base}.weight_scale": scales.reshape(1) if per_tensor else scales,
        }
        if not symmetric:
            zero = torch.from_numpy(zeros.astype(np.int8))
            tensors[f"{base}.weight_zero_point"] = zero.reshape(1) if per_tensor else zero
        return tensors, values.astype(np.float32)

    facts = compressed_facts("int-quantized", 8, None, symmetric=symmetric)
    group = facts["config_groups"]["group_0"]
    group["weights"]["strategy"] = "tensor" if per_tensor else "channel"
    group["input_activations"] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return pack, facts


def compressed_facts(layout: str, bits: int, group_size: int | None, *, symmetric: bool) -> dict[str, Any]:
    """quantization_config as llm-compressor writes it."""
    weights = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": group_size,
        "num_bits": bits,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "channel" if group_size is None else "group",
        "symmetric": symmetric,
        "type": "int",
    }
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": group},
        "format": layout,
        "global_compression_ratio": 1.5,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def fp8(
    scale: str = "block", *, blocks: tuple[int, int] = (32, 48), compressed: bool = False
) -> tuple[Pack, dict[str, Any]]:
    """FP8 (E4M3). scale: of a ``block``, a ``channel`` or the ``tensor``; compressed: as compressed-tensors has it."""

    def pack(base: str, shape: tuple[int, int], random: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        numbers = random.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn)
        height, length = {"block": blocks, "channel": (1, shape[1]), "tensor": shape}[scale]
        grid = tuple(-(-size // step) for size, step in zip(shape, (height, length), strict=True))
        scales = random.uniform(0.05, 0.2, grid).astype(np.float32)
        if compressed:
            scales = scales.astype(ml_dtypes.bfloat16).astype(np.float32)
        factors = np.repeat(np.repeat(scales, height, axis=0), length, axis=1)[: shape[0], : shape[1]]
        values = numbers.astype(np.float32) * factors
        weight = torch.from_numpy(numbers.view(np.uint8).copy()).view(torch.float8_e4m3fn)
        name = f"{base}.weight_scale" if compressed or scale != "block" else f"{base}.weight_scale_inv"
        stored = torch.from_numpy(scales.reshape(()) if scale == "tensor" else scales)
        return {f"{base}.weight": weight, name: stored.bfloat16() if compressed else stored}, values

    if compressed:
        facts = compressed_facts("float-quantized", 8, None, symmetric=True)
        facts["config_groups"]["group_0"]["weights"] |= {"type": "float", "strategy": scale}
        return pack, facts
    facts = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    return pack, facts | ({"weight_block_size": list(blocks)} if scale == "block" else {})
