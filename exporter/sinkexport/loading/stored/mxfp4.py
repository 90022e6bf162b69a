"""MXFP4 checkpoints (gpt-oss): experts in FP4 numbers (E2M1), 32 to a power of two.

``NAME_blocks`` uint8 [E, M, G, 16], two numbers to a byte, the first one low. ``NAME_scales`` uint8 [E, M, G],
exponents plus 127. The model has them as [E, K, M]. Each is a float32 number exactly.

Source: OCP Microscaling Formats 1.0; transformers, integrations/mxfp4.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sinkexport.loading.checkpoints.file_tensor import FileTensor, Floats, Indices
from sinkexport.loading.stored.settings import Known, anything, checked, nothing
from sinkexport.loading.stored.tensors import ComputedTensor, computed, joined, refused

NUMBERS = np.array((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0), np.float32)
BIAS, LARGEST = 127, 254
BLOCKS, SCALES = "_blocks", "_scales"
WHERE = "quantization_config of config.json"
KNOWN: Known = {"quant_method": ("mxfp4",), "modules_to_not_convert": anything, "dequantize": nothing}


def mxfp4_tensors(tensors: Mapping[str, FileTensor], facts: Mapping[str, Any]) -> dict[str, FileTensor]:
    """The tensors of such a checkpoint as the model has them. facts: its quantization_config.

    Raises: UsageError for settings that are not understood, and for parts that are missing or do not fit.
    """
    checked(facts, KNOWN, WHERE)
    found, made = dict(tensors), []
    for name, blocks in tensors.items():
        if not name.endswith(BLOCKS):
            continue
        base = name.removesuffix(BLOCKS)
        scales = found.pop(f"{base}{SCALES}", None)
        del found[name]
        if scales is None:
            raise refused(f"'{name}' without '{base}{SCALES}'", "every part of each weight")
        made.append(_tensor(base, blocks, scales))
    return joined(found, made)


def _tensor(name: str, blocks: FileTensor, scales: FileTensor) -> ComputedTensor:
    packed, exponents = blocks.array(), scales.array()
    if packed.dtype != np.uint8 or exponents.dtype != np.uint8 or packed.ndim != 4 or packed.shape[-1] != 16:
        raise refused(f"'{blocks.name}' {blocks.dtype} {list(blocks.shape)}", "uint8, 16 to a block")
    if exponents.shape != packed.shape[:-1]:
        raise refused(f"'{scales.name}' {list(scales.shape)}", f"{list(packed.shape[:-1])}, as its blocks")
    if exponents.max(initial=0) > LARGEST:
        raise refused(f"'{scales.name}' with NaN", "finite scales")
    count, width, groups, _ = packed.shape
    depth = 32 * groups

    def matrix(expert: int) -> Floats:
        """[K, M]."""
        both = packed[expert]
        values = NUMBERS[np.stack((both & 15, both >> 4), axis=-1)].reshape(width, groups, 32)
        values = np.ldexp(values, exponents[expert].astype(np.int32)[..., None] - BIAS)
        return np.ascontiguousarray(values.reshape(width, depth).T)

    def read(rows: Indices | None) -> Floats:
        wanted = np.arange(count * depth) if rows is None else rows
        result = np.empty((len(wanted), width), np.float32)
        for expert in np.unique(wanted // depth):
            here = wanted // depth == expert
            result[here] = matrix(int(expert))[wanted[here] % depth]
        return result

    return computed(name, blocks.file, (count, depth, width), "MXFP4", read)
