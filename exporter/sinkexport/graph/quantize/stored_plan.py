"""The plan of a quantised checkpoint: its integers stay what they are wherever a target's operators take them.

What they do not take stays in floating point, as the numbers that the integers stand for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from sinkexport.graph.matmuls import Matmul, module_of
from sinkexport.graph.packed_weights import BLOCK_SIZES as CPU_BLOCKS
from sinkexport.graph.packed_weights import holds_half
from sinkexport.graph.quantize.int4_tiles import BLOCK_SIZES as TILE_BLOCKS
from sinkexport.graph.quantize.int4_tiles import INPUTS_MULTIPLE as TILE_INPUTS
from sinkexport.graph.quantize.ort import BLOCK_SIZES as ORT_BLOCKS
from sinkexport.graph.quantize.plan import Treatment, Use
from sinkexport.graph.quantize.plugin import INPUTS_MULTIPLE
from sinkexport.model.moe_layers import moe_layers
from sinkexport.quant.stored import StoredMatrix
from sinkexport.quant.stored_rows import RowIndex, StoredRows
from sinkexport.quant.weight import Rounded, WeightScheme

CHANNEL = 0
"""Stands for a scale of each output among block sizes."""

Forms = Mapping[tuple[int, bool], tuple[int, ...]]
"""Block sizes, the best ones first, by bits and whether there are no zero points."""

ORT: Forms = {(4, True): ORT_BLOCKS, (4, False): ORT_BLOCKS, (8, True): ORT_BLOCKS, (8, False): ORT_BLOCKS}
CPU: Forms = {
    (4, True): CPU_BLOCKS[::-1],
    (4, False): CPU_BLOCKS[::-1],
    (8, True): (CHANNEL, *CPU_BLOCKS[::-1]),
}
PER_CHANNEL: Forms = {(8, True): (CHANNEL,)}
PLUGIN: Forms = {(4, True): TILE_BLOCKS[::-1], (4, False): TILE_BLOCKS[::-1], **PER_CHANNEL}

MATMULS: Mapping[str, Sequence[Forms]] = {
    "ort": (ORT,),
    "cpu": (CPU, ORT),
    "plugin": (PLUGIN,),
    "qdq": (PER_CHANNEL,),
}
"""What the operators of each form of quantised matmuls take, a key of `graph.quantize.forms.FORMS`."""

EXPERTS: Mapping[str, Forms] = {
    "ort": PER_CHANNEL,
    "cpu": {(8, True): (CHANNEL, *CPU_BLOCKS[::-1])},
    "plugin": PLUGIN,
    "qdq": {},
}
"""The same of the matrices of experts."""


class StoredPlan:
    """Answers what the graph passes ask. matrices: of the checkpoint. dtype: of the model's parameters.

    quantization: the target's form, a key of `MATMULS`.
    """

    def __init__(
        self,
        matrices: Sequence[StoredMatrix],
        model: Any,
        dtype: Literal["float32", "float16"],
        quantization: str,
    ) -> None:
        self._index = RowIndex(matrices, dtype)
        self._dtype = dtype
        self._quantization = quantization
        self._parameters: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
        self._moe_prefixes = tuple(f"{path}." for path in moe_layers(model))
        self._found: dict[str, StoredRows | None] = {}
        self._used: set[str] = set()  # names of matrices that were found
        self.kept: dict[str, WeightScheme] = {}
        """How each tensor of the checkpoint is written that stays integers in a graph."""

    def kind(self, module: str) -> object:
        """Projections are joined if their integers have one form, and their inputs one order."""
        name = f"{module}.weight"
        parameter = self._parameters.get(name)
        if parameter is None or parameter.ndim != 2:
            return None
        found = self._rows(name, parameter.detach().numpy())
        return None if found is None else found.form

    def divisors(self, module: str) -> npt.NDArray[np.float64] | None:  # noqa: ARG002 - as all plans
        """Nothing: a divided weight is another one."""
        return None

    def treatment(self, matmul: Matmul) -> Treatment | None:
        """The integers of a matmul's matrix, where the target multiplies them."""
        parts = [self._rows(f"{module_of(name)}.weight", tensor.numpy()) for name, tensor in matmul.rows]
        found = joined(parts)
        if found is None or (matmul.is_table and found.first.order is not None):
            return None  # rows of a table are read as they are
        return self._treatment(found, MATMULS[self._quantization])

    def is_bfloat16(self, module: str) -> bool:  # noqa: ARG002 - as all plans
        """Never: what is not kept as integers stays exact."""
        return False

    def table(self, module: str) -> WeightScheme | None:  # noqa: ARG002 - as all plans
        """None: see `of_rows`."""
        return None

    def experts(self, parameter: str) -> WeightScheme | None:  # noqa: ARG002 - as all plans
        """None: see `of_rows`."""
        return None

    def of_rows(self, name: str, rows: ir.TensorProtocol, use: Use) -> Treatment | None:
        """The integers of a table or of the matrices of experts, rows [n, K], where the target reads them."""
        if use == "table" and name.startswith(self._moe_prefixes):
            return None  # biases of experts, whose rows are gathered too
        found = self._rows(f"{use} {name}", rows.numpy())
        if found is None or found.first.order is not None:
            return None
        kinds = (EXPERTS[self._quantization],) if use == "experts" else MATMULS[self._quantization]
        return self._treatment(found, kinds)

    def _rows(self, name: str, rows: npt.NDArray[Any]) -> StoredRows | None:
        if name not in self._found:
            found = self._found[name] = self._index.find(rows, self._used)
            self._used |= {matrix.name for matrix in found.matrices} if found else set()
        return self._found[name]

    def _treatment(self, found: StoredRows, kinds: Sequence[Forms]) -> Treatment | None:
        is_plugin, depth = self._quantization == "plugin", found.first.shape[1]
        for forms in kinds:
            for bits, symmetric in ((found.first.bits, found.symmetric), (8, True)):
                size = _block(found, forms.get((bits, symmetric), ()))
                if size is None or not _fits(found, bits, symmetric=symmetric):
                    continue
                if is_plugin and depth % (TILE_INPUTS if bits == 4 else INPUTS_MULTIPLE):
                    continue
                # The plugin's are float16 for INT4 and float32 for INT8, whatever the model's numbers are.
                scale_dtype = self._dtype if not is_plugin else "float16" if bits == 4 else "float32"
                if scale_dtype == "float16" and not holds_half(found.read().scales):
                    continue
                scheme = WeightScheme(bits, size or None, symmetric, "stored", scale_dtype)
                self.kept |= {matrix.name: scheme for matrix in found.matrices}
                order = found.first.order
                return Treatment(scheme, functools.partial(_read, found, scheme), order=order)
        return None


def _fits(found: StoredRows, bits: int, *, symmetric: bool) -> bool:
    """Whether the integers, less their zero points where the form has none, have these bits."""
    return (bits == found.first.bits and symmetric == found.symmetric) or (bits == 8 and found.first.bits == 4)


def joined(parts: Sequence[StoredRows | None]) -> StoredRows | None:
    """Rows one below the other; None: some are not stored, or they have several forms."""
    found = [part for part in parts if part is not None]
    if len(found) < len(parts) or len({part.form for part in found}) != 1:
        return None
    starts = np.cumsum([0, *(len(part.matrices) for part in found[:-1])])
    return StoredRows(
        tuple(matrix for part in found for matrix in part.matrices),
        np.concatenate([part.number + start for part, start in zip(found, starts, strict=True)]),
        np.concatenate([part.row for part in found]),
    )


def _block(found: StoredRows, sizes: Sequence[int]) -> int | None:
    """The first of these block sizes in whose blocks all inputs share a scale; None: there is none."""
    stored, depth = found.first.block_size, found.first.shape[1]
    if stored is None:  # blocks that inputs fill, or the smallest
        return next((size for size in sizes if size == CHANNEL or depth % size == 0), sizes[-1] if sizes else None)
    return next((size for size in sizes if size != CHANNEL and stored % size == 0), None)


def _read(found: StoredRows, scheme: WeightScheme) -> Rounded:
    """Integers in the scheme's bits, each with the scale that it has, which may be that of several blocks."""
    stored, depth = found.read(), found.first.shape[1]
    integers, zeros = stored.integers, stored.zero_points
    if scheme.symmetric and zeros is not None:
        block = found.first.block_size or depth
        integers = (integers.astype(np.int16) - np.repeat(zeros, block, axis=1)[:, :depth]).astype(np.int8)
        zeros = None
    if scheme.block_size is None or scheme.block_size == found.first.block_size:
        return Rounded(integers, stored.scales, zeros)
    groups = -(-depth // scheme.block_size)
    times = groups if found.first.block_size is None else found.first.block_size // scheme.block_size
    scales = np.repeat(stored.scales, times, axis=1)[:, :groups]
    return Rounded(integers, scales, None if zeros is None else np.repeat(zeros, times, axis=1)[:, :groups])
