"""compressed-tensors checkpoints, which llm-compressor writes: ``pack-quantized`` INT4 and INT8, ``int-quantized``
INT8, ``float-quantized`` and ``naive-quantized`` FP8.

``weight_packed`` int32 [N, K * bits / 32]: an output's inputs, the lowest bits first, 2^(bits - 1) added to each.
``weight_scale`` [N, G]. ``weight_zero_point`` likewise packed, down the outputs. ``weight_shape``: N, K. Unpacked
formats have ``weight`` in int8 or FP8 and their zero points as they are.

A module's bits follow from its shapes; a group of the configuration must say the same.

Source: compressed-tensors 0.20, compressed_tensors/compressors and quantization/lifecycle/forward_helpers.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sinkexport.loading.checkpoints.file_tensor import FileTensor, Indices
from sinkexport.loading.stored.bit_fields import unpacked
from sinkexport.loading.stored.float8 import scaled
from sinkexport.loading.stored.settings import Known, anything, checked, nothing, unknown
from sinkexport.loading.stored.tensors import ComputedTensor, Parts, grouped, joined, kind_of, refused, stored
from sinkexport.quant.stored import StoredMatrix
from sinkexport.quant.weight import Rounded

PACKED, PLAIN = ("pack-quantized",), ("int-quantized", "float-quantized", "naive-quantized")
FORMATS = (*PACKED, *PLAIN)
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
WORD_BITS = 32
BY_GROUP = ("group", "dynamic")
"""Activation orders that scatter the inputs of a group; the others order them only while weights are rounded."""
NO_GROUP = -1
"""Group of every input, where a file keeps ``weight_g_idx`` without an order."""

WHERE = "quantization_config of config.json"

KNOWN: Known = {
    "quant_method": ("compressed-tensors",),
    "format": (*FORMATS, "mixed-precision"),  # each group's own
    "config_groups": anything,  # checked one by one
    "quantization_status": ("compressed", "frozen"),
    "ignore": anything,
    "kv_cache_scheme": anything,  # how others may keep their cache
    "global_compression_ratio": anything,
    "version": anything,
    "sparsity_config": nothing,
    "transform_config": nothing,  # rotations at run time
    "moe_sparsity_config": nothing,
    "run_compressed": anything,
}
KNOWN_OF_GROUP: Known = {
    "weights": anything,
    "input_activations": anything,
    "output_activations": nothing,
    "targets": anything,
    "format": (None, *FORMATS),
}
KNOWN_OF_WEIGHTS: Known = {
    "num_bits": (2, 4, 8),
    "type": ("int", "float"),
    "symmetric": (True, False),
    "strategy": ("group", "channel", "tensor", "block"),
    "group_size": anything,
    "block_structure": anything,
    "dynamic": (False,),
    "actorder": (None, False, "weight", "static", "group", "dynamic"),
    "scale_dtype": anything,
    "zp_dtype": anything,
    "observer": anything,
    "observer_kwargs": anything,
}


def compressed_tensors(tensors: Mapping[str, FileTensor], facts: Mapping[str, Any]) -> dict[str, FileTensor]:
    """The tensors of such a checkpoint as the model has them. facts: its quantization_config.

    Raises: UsageError for settings that are not understood, and for parts that are missing or do not fit.
    """
    settings = checked(facts, KNOWN, WHERE)
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise unknown(WHERE, "no config_groups", "at least one")
    schemes = [_scheme(group) for group in groups.values()]
    packed, others = grouped(_with_packed(tensors), PARTS, "weight_packed")
    rest = {name: tensor for name, tensor in tensors.items() if name in others or not _is_packed(name, tensors)}
    plain, others = _plain(rest)
    made = [*(_packed_tensor(parts, schemes) for parts in packed), *(_plain_tensor(parts, schemes) for parts in plain)]
    return joined(others, made)


def _is_packed(name: str, tensors: Mapping[str, FileTensor]) -> bool:
    base = next((name.removesuffix(f".{part}") for part in PARTS if name.endswith(f".{part}")), None)
    return base is not None and f"{base}.weight" not in tensors


def _with_packed(tensors: Mapping[str, FileTensor]) -> dict[str, FileTensor]:
    return {name: tensor for name, tensor in tensors.items() if _is_packed(name, tensors)}


def _plain(tensors: Mapping[str, FileTensor]) -> tuple[list[Parts], dict[str, FileTensor]]:
    """Weights that lie unpacked, with their scales, and all other tensors."""
    scaled_ones = {name.removesuffix("_scale") for name in tensors if name.endswith(".weight_scale")}
    found, others = {}, dict(tensors)
    for name in scaled_ones:
        base = name.removesuffix(".weight")
        suffixes = ("weight", "weight_scale", "weight_zero_point")
        found[base] = {suffix: others.pop(f"{base}.{suffix}") for suffix in suffixes if f"{base}.{suffix}" in others}
    return [Parts(base, parts) for base, parts in found.items()], others


def _scheme(group: object) -> dict[str, Any]:
    where = f"{WHERE}, config_groups"
    settings = checked(group, KNOWN_OF_GROUP, where)
    weights = checked(settings.get("weights"), KNOWN_OF_WEIGHTS, f"{where}, weights")
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", **weights}


def _packed_tensor(parts: Parts, schemes: Sequence[Mapping[str, Any]]) -> ComputedTensor:
    words = parts.words("weight_packed", (None, None))
    width, depth = (int(n) for n in parts.array("weight_shape", "i", (2,)))
    if width != len(words) or depth < 1:
        raise refused(f"'{parts.base}.weight_shape' {width} x {depth}, and {len(words)} rows", "the same number")
    bits = next((b for b in (2, 4, 8) if -(-depth * b // WORD_BITS) == words.shape[1]), None)
    if bits is None:
        raise refused(f"'{parts.base}.weight_packed' {list(words.shape)} for {depth} inputs", "2, 4 or 8 bits each")
    symmetric = "weight_zero_point" not in parts.by_suffix
    num_groups = parts.array("weight_scale", "f", (width, None)).shape[1]
    block = _block(parts, schemes, bits, depth, num_groups, symmetric=symmetric)
    scales = parts.scales("weight_scale", (width, num_groups))
    zeros = None
    if not symmetric:
        fields = parts.words("weight_zero_point", (-(-width * bits // WORD_BITS), num_groups))
        zeros = np.ascontiguousarray(unpacked(np.ascontiguousarray(fields.T), bits, width).T)  # [N, G]
    is_by_group = any(scheme.get("actorder") in BY_GROUP for scheme in schemes)
    order = _order(parts, depth, block, num_groups, is_by_group=is_by_group)
    offset = 2 ** (bits - 1)

    def read(rows: Indices | None) -> Rounded:
        some = slice(None) if rows is None else rows
        codes = unpacked(words[some], bits, depth)
        if order is not None:
            codes = codes[:, order]
        if zeros is None:
            return Rounded((codes.astype(np.int16) - offset).astype(np.int8), scales()[some], None)
        return Rounded(codes, scales()[some], zeros[some])

    matrix = StoredMatrix(
        name=f"{parts.base}.weight",
        shape=(width, depth),
        bits=8 if bits == 8 else 4,
        block_size=None if block >= depth else block,
        symmetric=symmetric,
        read=read,
        kind=f"compressed-tensors {bits} bits",
        order=order,
    )
    return stored(parts.by_suffix["weight_packed"].file, matrix)


def _plain_tensor(parts: Parts, schemes: Sequence[Mapping[str, Any]]) -> ComputedTensor:
    name = f"{parts.base}.weight"
    if "weight" not in parts.by_suffix:
        raise refused(f"'{name}_scale' without its weight", "every part of each weight")
    tensor = parts.by_suffix["weight"]
    if len(tensor.shape) != 2:
        raise refused(f"'{name}' {list(tensor.shape)} with scales", "a matrix")
    if kind_of(tensor.array()) == "8":
        if "weight_zero_point" in parts.by_suffix:
            raise refused(f"'{name}' in FP8 with zero points", "none")
        if not any((one["type"], one["num_bits"]) == ("float", 8) for one in schemes):
            raise refused(f"'{name}' in FP8, which no group of quantization_config says", "one group that says so")
        blocks = next((s.get("block_structure") for s in schemes if s["strategy"] == "block"), None)
        return scaled(tensor, parts.by_suffix["weight_scale"], blocks)
    integers = parts.array("weight", "i", (None, None))
    if integers.dtype != np.int8:
        raise refused(f"'{name}' of type {tensor.dtype} with scales", "int8 or FP8")
    width, depth = integers.shape
    given = parts.by_suffix["weight_scale"].shape
    per_tensor = given in ((), (1,))
    num_groups = 1 if per_tensor else parts.array("weight_scale", "f", (width, None)).shape[1]
    symmetric = "weight_zero_point" not in parts.by_suffix
    block = _block(parts, schemes, 8, depth, num_groups, symmetric=symmetric)
    scales = parts.scales("weight_scale", given if per_tensor else (width, num_groups))
    zeros: npt.NDArray[np.uint8] | None = None
    if not symmetric:
        signed = parts.array("weight_zero_point", "i", given if per_tensor else (width, num_groups))
        if signed.min() < -128 or signed.max() > 127:
            raise refused(f"'{parts.base}.weight_zero_point' beyond 8 bits", "-128 .. 127")
        zeros = np.broadcast_to((signed.astype(np.int16) + 128).astype(np.uint8), (width, num_groups))

    def read(rows: Indices | None) -> Rounded:
        some = slice(None) if rows is None else rows
        steps = np.broadcast_to(scales(), (width, num_groups))[some]
        if zeros is None:
            return Rounded(np.asarray(integers[some]), steps, None)
        return Rounded((integers[some].astype(np.int16) + 128).astype(np.uint8), steps, zeros[some])

    matrix = StoredMatrix(
        name=name,
        shape=(width, depth),
        bits=8,
        block_size=None if block >= depth else block,
        symmetric=symmetric,
        read=read,
        kind="compressed-tensors 8 bits",
    )
    return stored(tensor.file, matrix)


def _block(
    parts: Parts, schemes: Iterable[Mapping[str, Any]], bits: int, depth: int, num_groups: int, *, symmetric: bool
) -> int:
    """Inputs that share a scale, as the one scheme of the configuration says that fits the tensors."""
    fitting, orders = set(), set()
    for scheme in schemes:
        if (scheme["type"], scheme["num_bits"], scheme["symmetric"]) != ("int", bits, symmetric):
            continue
        if scheme["strategy"] in ("channel", "tensor") and num_groups == 1:
            fitting.add(depth)
        size = scheme.get("group_size")
        if scheme["strategy"] == "group" and isinstance(size, int) and size > 0 and -(-depth // size) == num_groups:
            fitting.add(min(size, depth))
            orders.add(scheme.get("actorder") in BY_GROUP)
    if orders == {True}:
        parts.array("weight_g_idx", "i", (depth,))  # without it the order of inputs is lost
    if len(fitting) != 1:
        raise refused(
            f"'{parts.base}': {bits} bits, {num_groups} scales a row{'' if symmetric else ', zero points'}, which "
            f"{'several groups' if fitting else 'no group'} of quantization_config may mean",
            "one group that says so",
        )
    return int(fitting.pop())


def _order(parts: Parts, depth: int, block: int, num_groups: int, *, is_by_group: bool) -> Indices | None:
    """Inputs by their groups, which activation order (``actorder: group``) scatters; None: as they are."""
    if "weight_g_idx" not in parts.by_suffix:
        return None
    groups = np.asarray(parts.array("weight_g_idx", "i", (depth,)), np.int64)
    if (groups == NO_GROUP).all() and not is_by_group:
        return None
    order = np.argsort(groups, kind="stable")
    if groups.min() < 0 or groups.max() >= num_groups or (groups[order] != np.arange(depth) // block).any():
        raise refused(f"'{parts.base}.weight_g_idx' with groups of uneven sizes", f"{block} inputs in each")
    return None if (order == np.arange(depth)).all() else order
