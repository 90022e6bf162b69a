"""AutoAWQ checkpoints in the layout ``gemm``: 4 bits with zero points.

``qweight`` int32 [K, N / 8] and ``qzeros`` int32 [G, N / 8]: the fields of a word are outputs 0, 2, 4, 6, 1, 3, 5, 7,
the lowest bits first. ``scales`` [G, N].

Source: arXiv:2306.00978; AutoAWQ, awq/utils/packing_utils.py and awq/modules/linear/gemm.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sinkexport.loading.checkpoints.file_tensor import FileTensor, Indices
from sinkexport.loading.stored.settings import Known, anything, checked, is_size, nothing, unknown
from sinkexport.loading.stored.tensors import ComputedTensor, Parts, grouped, joined, refused, stored
from sinkexport.quant.stored import StoredMatrix
from sinkexport.quant.weight import Rounded

SUFFIXES = ("qweight", "qzeros", "scales")
FIELDS = 8
PLACES = np.array((0, 4, 1, 5, 2, 6, 3, 7), np.int64)
"""Field of each of a word's outputs."""

HALF = 8
WHERE = "quantization_config of config.json"

KNOWN: Known = {
    "quant_method": ("awq",),
    "bits": (4,),
    "group_size": is_size,
    "zero_point": (True, False),
    "version": ("gemm", "GEMM"),
    "format": (None, "gemm", "GEMM"),
    "modules_to_not_convert": anything,
    "backend": (None, "auto", "autoawq"),
    "do_fuse": nothing,
    "fuse_max_seq_len": anything,
    "exllama_config": anything,
    "modules_to_fuse": anything,
    "sym": (True, False),
    "desc_act": nothing,
    "meta": anything,
    "tokenizer": anything,
    "dataset": anything,
    "damp_percent": anything,
    "act_group_aware": anything,
    "true_sequential": anything,
    "model_seqlen": anything,
    "block_name_to_quantize": anything,
    "module_name_preceding_first_block": anything,
    "batch_size": anything,
    "pad_token_id": anything,
    "max_input_length": anything,
    "cache_block_outputs": anything,
    "modules_in_block_to_quantize": anything,
}


def awq_tensors(tensors: Mapping[str, FileTensor], facts: Mapping[str, Any]) -> dict[str, FileTensor]:
    """The tensors of an AWQ checkpoint as the model has them. facts: its quantization_config.

    Raises: UsageError for settings that are not understood, and for parts that are missing or do not fit.
    """
    settings = checked(facts, KNOWN, WHERE, needed=("bits", "group_size"))
    if settings.get("version") is None and settings.get("format") is None:
        raise unknown(WHERE, "no version", "gemm")
    groups, others = grouped(tensors, SUFFIXES, "qweight")
    is_symmetric = settings.get("zero_point") is False or settings.get("sym") is True
    made = (_tensor(parts, settings["group_size"], is_symmetric=is_symmetric) for parts in groups)
    return joined(others, made)


def _tensor(parts: Parts, group_size: int, *, is_symmetric: bool) -> ComputedTensor:
    words = parts.words("qweight", (None, None))
    depth, width = len(words), words.shape[1] * FIELDS
    block = depth if group_size == -1 else group_size
    if depth % block:
        raise refused(f"'{parts.base}' with {depth} inputs in groups of {block}", "whole groups")
    scales = parts.scales("scales", (depth // block, width))
    zeros = _outputs(parts.words("qzeros", (depth // block, width // FIELDS)))
    symmetric = bool((zeros == HALF).all())
    if is_symmetric and not symmetric:
        raise refused(
            f"'{parts.base}.qzeros' other than {HALF}, and a configuration without zero points", "one of them"
        )

    def read(rows: Indices | None) -> Rounded:
        some = slice(None) if rows is None else rows
        if rows is None:
            codes = _outputs(words)
        else:
            shifts = (4 * PLACES[rows % FIELDS]).astype(np.uint32)
            codes = ((words.astype(np.uint32)[:, rows // FIELDS] >> shifts) & 15).astype(np.uint8)
        codes, steps = np.ascontiguousarray(codes.T), np.ascontiguousarray(scales()[:, some].T)
        if symmetric:
            return Rounded(codes.astype(np.int8) - np.int8(HALF), steps, None)
        return Rounded(codes, steps, np.ascontiguousarray(zeros[:, some].T))

    matrix = StoredMatrix(
        name=f"{parts.base}.weight",
        shape=(width, depth),
        bits=4,
        block_size=None if block == depth else block,
        symmetric=symmetric,
        read=read,
        kind="AWQ 4 bits",
    )
    return stored(parts.by_suffix["qweight"].file, matrix)


def _outputs(words: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """uint8 [n, N] of int32 [n, N / 8]."""
    shifts = (4 * PLACES).astype(np.uint32)
    fields = (words.astype(np.uint32)[..., None] >> shifts) & 15
    return fields.astype(np.uint8).reshape(len(words), -1)
