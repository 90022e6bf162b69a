"""Quantised model folders: which tensors stand for which, by the method that config.json names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sinkrt.errors import UsageError, problem

from sinkexport.loading.checkpoints.file_tensor import FileTensor
from sinkexport.loading.checkpoints.weight_files import read_json
from sinkexport.loading.stored.awq import awq_tensors
from sinkexport.loading.stored.compressed import compressed_tensors
from sinkexport.loading.stored.float8 import float8_tensors
from sinkexport.loading.stored.gptq import gptq_tensors
from sinkexport.loading.stored.mxfp4 import mxfp4_tensors
from sinkexport.loading.stored.tensors import ComputedTensor, refused

CONFIG = "config.json"
KEYS = ("quantization_config", "compression_config")

METHODS: Mapping[str, Callable[[Mapping[str, FileTensor], Mapping[str, Any]], dict[str, FileTensor]]] = {
    "compressed-tensors": compressed_tensors,
    "gptq": gptq_tensors,
    "awq": awq_tensors,
    "fp8": float8_tensors,
    "mxfp4": mxfp4_tensors,
}
"""Reader of each method's tensors, by the name that ``quant_method`` has."""

WHY_NOT: Mapping[str, str] = {
    "bitsandbytes": "codes look up in tables, and scales are rounded themselves; no target multiplies those",
    "modelopt": "its scales lie in several layouts, and its configuration does not say in which",
    "fbgemm_fp8": "inputs are clipped at run time",
    "quanto": "its tensors are pickled classes",
    "torchao": "its tensors are pickled classes",
    "hqq": "zero points are no integers",
    "bitnet": "inputs and results are scaled at run time",
}
"""Why a method is refused; others are not known."""

NO_EFFECT = (
    ".input_scale",
    ".activation_scale",
    ".input_zero_point",
    ".k_scale",
    ".v_scale",
    ".k_zero_point",
    ".v_zero_point",
)
"""Endings of scales for inputs and caches, which this project's graphs do not round so."""


def quantization_of(folder: Path) -> Mapping[str, Any] | None:
    """What config.json says of how a folder's weights are quantised; None: nothing.

    Raises: UsageError for what is no table, or names no method that is understood.
    """
    if not (folder / CONFIG).is_file():
        return None
    facts = read_json(folder / CONFIG)
    holders = [facts, *(part for part in facts.values() if isinstance(part, Mapping))]
    found = [holder[key] for holder in holders for key in KEYS if holder.get(key) is not None]
    if not found:
        return None
    chosen = found[0]
    if not isinstance(chosen, Mapping) or any(one != chosen for one in found):
        raise refused("quantization_config that is no table, or there twice", "one table")
    method = chosen.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        reason = WHY_NOT.get(str(method))
        raise UsageError(
            problem(
                "quantised weights",
                received=f"quant_method {method!r:.40}" + (f": {reason}" if reason else ""),
                expected=" | ".join(METHODS),
                fix="export the model's floating-point original, or one quantised otherwise",
            )
        )
    return chosen


def with_stored(tensors: Mapping[str, FileTensor], facts: Mapping[str, Any] | None) -> dict[str, FileTensor]:
    """The tensors of a folder as the model has them. facts: as `quantization_of` gives them.

    Raises: UsageError for settings that are not understood, for parts that are missing or do not fit, and for a folder
    without any quantised tensor.
    """
    if facts is None:
        return dict(tensors)
    found = METHODS[facts["quant_method"]](tensors, facts)
    if not any(isinstance(tensor, ComputedTensor) for tensor in found.values()):
        raise refused(f"quantization_config of {facts['quant_method']}, and no quantised tensor", "what it says")
    return {name: tensor for name, tensor in found.items() if not name.endswith(NO_EFFECT)}
