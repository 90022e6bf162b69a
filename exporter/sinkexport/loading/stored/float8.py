"""FP8 checkpoints: DeepSeek's and Qwen's blocks of 128 x 128, a scale for each output, or one for the tensor.

No target multiplies FP8 weights, so they become the floating-point numbers that they stand for: each is one product of
an FP8 number and its scale, in float32.

Source: arXiv:2412.19437 (DeepSeek-V3); transformers, integrations/finegrained_fp8.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sinkexport.loading.checkpoints.file_tensor import FileTensor, Floats, Indices
from sinkexport.loading.stored.settings import Known, anything, checked, nothing
from sinkexport.loading.stored.tensors import ComputedTensor, computed, kind_of, refused

SCALES = ("_scale_inv", "_scale")
WHERE = "quantization_config of config.json"
KNOWN: Known = {
    "quant_method": ("fp8",),
    "activation_scheme": ("dynamic", "static"),
    "weight_block_size": anything,
    "fmt": (None, "e4m3"),
    "scale_fmt": (None, "float", "ue8m0"),
    "modules_to_not_convert": anything,
    "ignored_layers": anything,
    "modules_to_convert": anything,
    "expert_dtype": (None, "fp8"),
    "dequantize": nothing,
}


def float8_tensors(tensors: Mapping[str, FileTensor], facts: Mapping[str, Any]) -> dict[str, FileTensor]:
    """The tensors of such a checkpoint as the model has them. facts: its quantization_config.

    Raises: UsageError for settings that are not understood, and for scales that are missing or do not fit.
    """
    settings = checked(facts, KNOWN, WHERE)
    blocks = settings.get("weight_block_size")
    found = dict(tensors)
    for name, tensor in tensors.items():
        if kind_of(tensor.array()) != "8" or name.endswith(SCALES):
            continue
        scale = next((found.pop(f"{name}{suffix}") for suffix in SCALES if f"{name}{suffix}" in found), None)
        if scale is None:
            raise refused(f"'{name}' of type {tensor.dtype} without its scales", "every part of each weight")
        found[name] = scaled(tensor, scale, blocks)
    return found


def scaled(tensor: FileTensor, scale: FileTensor, blocks: Sequence[int] | str | None) -> ComputedTensor:
    """A tensor of FP8 numbers [.., N, K] times its scales.

    blocks: rows and columns of a block, two numbers or ``128x128``; None: there are none.

    Raises: UsageError for scales of another shape, or that are not finite.
    """
    stored = scale.array()
    if kind_of(stored) not in "f8":
        raise refused(f"'{scale.name}' of type {scale.dtype}", "floating-point scales")
    factors = np.asarray(stored, np.float32)
    if not np.isfinite(factors).all():
        raise refused(f"'{scale.name}' with NaN or Inf", "finite scales")
    if len(tensor.shape) < 2:
        raise refused(f"'{tensor.name}' {list(tensor.shape)} of type {tensor.dtype}", "a matrix")
    *leading, width, depth = tensor.shape
    if factors.size == 1 and (blocks is None or _is_one_block(tensor, blocks)):
        height, length, factors = width, depth, factors.reshape(1, 1)
    elif factors.shape in ((*leading, width), (*leading, width, 1)):
        height, length, factors = 1, depth, factors.reshape(-1, 1)
    else:
        height, length = _block(tensor, blocks)
        rows, columns = -(-width // height), -(-depth // length)
        if factors.shape != (*leading, rows, columns):
            raise refused(
                f"'{scale.name}' {list(factors.shape)} for '{tensor.name}' {list(tensor.shape)}",
                f"a scale for each block of {height} x {length}, each row, or the tensor",
            )
        factors = factors.reshape(-1, columns)
    per_matrix = len(factors) if factors.size == 1 else -(-width // height)
    column = np.arange(depth) // length

    def read(rows: Indices | None) -> Floats:
        numbers = tensor.array().reshape(-1, depth)
        chosen = np.arange(len(numbers)) if rows is None else rows
        row = chosen // width * per_matrix + chosen % width // height if factors.size > 1 else np.zeros_like(chosen)
        values = np.asarray(numbers[chosen], np.float32)
        values *= factors[row][:, column] if factors.shape[1] > 1 else factors[row]
        return values

    return computed(tensor.name, tensor.file, tensor.shape, "FP8", read)


def _is_one_block(tensor: FileTensor, blocks: Sequence[int] | str) -> bool:
    """Whether a scale of a block is one of the whole tensor [.., N, K]."""
    height, length = _block(tensor, blocks)
    return tensor.shape[-2] <= height and tensor.shape[-1] <= length and math.prod(tensor.shape[:-2]) == 1


def _block(tensor: FileTensor, blocks: Sequence[int] | str | None) -> tuple[int, int]:
    if isinstance(blocks, str):  # as older files have it: 128x128
        sizes: list[Any] = [int(size) if size.isdecimal() else size for size in blocks.split("x")]
    else:
        sizes = list(blocks) if isinstance(blocks, Sequence) else []
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise refused(f"'{tensor.name}' in blocks, and sizes {blocks!r:.40}", "rows and columns of a block")
    return int(sizes[0]), int(sizes[1])
