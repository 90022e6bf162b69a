"""GPTQ checkpoints (AutoGPTQ, GPTQModel, optimum): 2, 3, 4 and 8 bits, with and without activation order.

``qweight`` int32 [K * bits / 32, N]: fields of an output's inputs down a column. ``qzeros`` int32 [G, N * bits / 32]:
fields of a group's outputs along a row. ``scales`` [G, N]. ``g_idx`` int32 [K]: the group of each input.

Format ``gptq`` (v1) stores each zero point less one, ``gptq_v2`` as it is. A v1 field of all ones is a zero point of 0
or 2^bits, by who reads it: AutoGPTQ's kernels wrap it within the field, exllama's take 2^bits, GPTQModel adds to whole
words, so that a carry changes the next field. Words that GPTQModel wrote are read as it reads them; others are refused.

Source: arXiv:2210.17323; AutoGPTQ, auto_gptq/nn_modules/qlinear; GPTQModel, gptqmodel/utils/model.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sinkexport.loading.checkpoints.file_tensor import FileTensor, Floats, Indices, ZeroBias
from sinkexport.loading.stored.bit_fields import unpacked
from sinkexport.loading.stored.settings import Known, anything, checked, is_size, nothing, unknown
from sinkexport.loading.stored.tensors import ComputedTensor, Parts, computed, grouped, joined, refused, stored
from sinkexport.quant.stored import StoredMatrix
from sinkexport.quant.weight import Rounded

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
WORD_BITS = 32
V1, V2 = "gptq", "gptq_v2"
WHERE = "quantization_config of config.json"


def _only_leaves_out(modules: object) -> bool:
    """Whether GPTQModel's table of modules only names those that are not quantised, as their tensors show."""
    return isinstance(modules, Mapping) and all(str(name).startswith("-:") for name in modules)


KNOWN: Known = {
    "quant_method": ("gptq",),
    "method": ("gptq",),
    "bits": (2, 3, 4, 8),
    "group_size": is_size,
    "desc_act": (True, False),
    "sym": (True, False),
    "checkpoint_format": (None, V1, V2),
    "format": (None, V1, V2),
    "lm_head": (None, True, False),
    "dynamic": lambda value: not value or _only_leaves_out(value),  # else other bits for some modules
    "pack_dtype": (None, "int32"),
    "planar": nothing,  # a layout of GPTQModel 7 of its own
    "is_marlin_format": nothing,
    "rotation": nothing,
    "adapter": nothing,
    "meta": anything,
    "tokenizer": anything,
    "dataset": anything,
    "damp_percent": anything,
    "damp_auto_increment": anything,
    "static_groups": anything,
    "act_group_aware": anything,
    "true_sequential": anything,
    "mse": anything,
    "model_seqlen": anything,
    "max_input_length": anything,
    "block_name_to_quantize": anything,
    "module_name_preceding_first_block": anything,
    "modules_in_block_to_quantize": anything,
    "batch_size": anything,
    "pad_token_id": anything,
    "cache_block_outputs": anything,
    "backend": anything,
    "use_exllama": anything,
    "use_cuda_fp16": anything,
    "exllama_config": anything,
    "disable_exllama": anything,
    "model_name_or_path": anything,
    "model_file_base_name": anything,
    "quantizer": anything,
    "damp": anything,
}


def gptq_tensors(tensors: Mapping[str, FileTensor], facts: Mapping[str, Any]) -> dict[str, FileTensor]:
    """The tensors of a GPTQ checkpoint as the model has them. facts: its quantization_config.

    Raises: UsageError for settings that are not understood, and for parts that are missing or do not fit.
    """
    settings = checked(facts, KNOWN, WHERE, needed=("bits", "group_size"))
    versions = {version for key in ("checkpoint_format", "format") if (version := settings.get(key)) is not None}
    if len(versions) > 1:
        raise unknown(WHERE, f"formats {' and '.join(sorted(versions))}", "one")
    is_v1 = versions != {V2}
    quantizer = str((settings.get("meta") or {}).get("quantizer", "")) if isinstance(settings.get("meta"), dict) else ""
    by_word = "gptqmodel" in quantizer
    groups, others = grouped(tensors, SUFFIXES, "qweight")
    for parts in groups:
        bias = others.get(f"{parts.base}.bias")
        if bias is not None and not bias.array().any():
            others[bias.name] = ZeroBias(bias.name, bias.shape, bias.dtype, bias.file, bias.array)
    return joined(others, (_tensor(parts, settings, is_v1, by_word=by_word) for parts in groups))


def _tensor(parts: Parts, settings: Mapping[str, Any], is_v1: bool, *, by_word: bool) -> ComputedTensor:
    bits, group_size = settings["bits"], settings["group_size"]
    words = parts.words("qweight", (None, None))
    depth, width = len(words) * WORD_BITS // bits, words.shape[1]
    block = depth if group_size == -1 else group_size
    num_groups = -(-depth // block)
    scales = parts.scales("scales", (num_groups, width))
    fields = parts.words("qzeros", (num_groups, -(-width * bits // WORD_BITS)))
    zeros = _zero_points(fields, bits, width, parts, is_v1=is_v1, by_word=by_word)
    half = 2 ** (bits - 1)
    symmetric = bool((zeros == half).all())
    if settings.get("sym") is True and not symmetric:
        raise refused(f"'{parts.base}.qzeros' other than {half}, and sym true", "zero points as sym says")
    groups = np.arange(depth) // block
    if settings.get("desc_act") or "g_idx" in parts.by_suffix:  # without it the order of inputs would be lost
        groups = np.asarray(parts.array("g_idx", "i", (depth,)), np.int64)
        if groups.min() < 0 or groups.max() >= num_groups:
            raise refused(f"'{parts.base}.g_idx' with group {groups.max()}", f"groups 0 .. {num_groups - 1}")
    order = np.argsort(groups, kind="stable")
    is_even = bool((groups[order] == np.arange(depth) // block).all())
    is_ordered = bool((order == np.arange(depth)).all())

    def read(by_order: Indices, rows: Indices | None) -> Rounded:
        """Integers with their inputs in this order, scales and zero points of each group."""
        some = slice(None) if rows is None else rows
        codes = unpacked(np.ascontiguousarray(words[:, some].T), bits, depth)
        if not (by_order is order and is_ordered):
            codes = codes[:, by_order]
        steps = np.ascontiguousarray(scales()[:, some].T)
        if symmetric:
            return Rounded((codes.astype(np.int16) - half).astype(np.int8), steps, None)
        return Rounded(codes, steps, np.ascontiguousarray(zeros[:, some].T))

    name, kind = f"{parts.base}.weight", f"GPTQ {bits} bits"
    file = parts.by_suffix["qweight"].file
    if is_even:
        matrix = StoredMatrix(
            name=name,
            shape=(width, depth),
            bits=8 if bits == 8 else 4,
            block_size=None if block >= depth else block,
            symmetric=symmetric,
            read=functools.partial(read, order),
            kind=kind,
            order=None if is_ordered else order,
        )
        return stored(file, matrix)

    def numbers(rows: Indices | None) -> Floats:
        found = read(np.arange(depth), rows)
        zero = 0 if found.zero_points is None else found.zero_points[:, groups].astype(np.float32)
        return (found.integers.astype(np.float32) - zero) * found.scales[:, groups]

    return computed(name, file, (width, depth), f"{kind}, groups of uneven sizes", numbers)


def _zero_points(
    fields: npt.NDArray[Any], bits: int, width: int, parts: Parts, *, is_v1: bool, by_word: bool
) -> npt.NDArray[np.uint8]:
    """uint8 [G, N]."""
    if not is_v1:
        return unpacked(fields, bits, width)
    if by_word and bits != 3:
        ones = sum(1 << place for place in range(0, WORD_BITS, bits))
        return unpacked((fields.astype(np.uint32) + np.uint32(ones)).astype(np.uint32), bits, width)
    found = unpacked(fields, bits, width)
    if (found == 2**bits - 1).any():
        raise refused(
            f"'{parts.base}.qzeros' in format gptq (v1) with a field of all ones, which programs read differently",
            "zero points above 0",
            "save it in format gptq_v2",
        )
    return found + np.uint8(1)
