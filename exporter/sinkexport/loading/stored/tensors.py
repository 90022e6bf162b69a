"""Tensors of a model that a file holds as several: read as the numbers that they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sinkrt.errors import UsageError, problem

from sinkexport.loading.checkpoints.file_tensor import FileTensor, Floats, Indices
from sinkexport.loading.checkpoints.weight_files import listed
from sinkexport.quant.stored import StoredMatrix

WORD_BYTES = 4
"""Size of what integers are packed into."""

Read = Callable[[Indices | None], Floats]
"""Rows [n] or None, all -> float32 [n, length of a row]."""


@dataclasses.dataclass(frozen=True, eq=False)
class ComputedTensor(FileTensor):
    """A tensor whose numbers are computed from those of a file, a few rows at a time where only those are asked for.

    matrix: its integers and scales; None: it is no matrix of integers, and `kind` says what it is instead.
    """

    read: Read
    kind: str
    matrix: StoredMatrix | None = None

    def rows(self, indices: Indices) -> Floats:
        """float32 [len(indices), length of a row]."""
        return self.read(indices)

    def columns(self, indices: Indices) -> Floats:
        """float32 [rows, len(indices)]."""
        return self.read(None)[:, indices]


def computed(name: str, file: str, shape: tuple[int, ...], kind: str, read: Read) -> ComputedTensor:
    """A tensor whose rows `read` gives."""
    return ComputedTensor(
        name=name, shape=shape, dtype="F32", file=file, array=lambda: read(None).reshape(shape), read=read, kind=kind
    )


def stored(file: str, matrix: StoredMatrix) -> ComputedTensor:
    """The tensor that a matrix of integers stands for."""
    tensor = computed(matrix.name, file, matrix.shape, matrix.kind, matrix.dequantized)
    return dataclasses.replace(tensor, matrix=matrix)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Tensors of a file that stand for one of the model. base: their common beginning; by_suffix: what follows it."""

    base: str
    by_suffix: Mapping[str, FileTensor]

    def array(self, suffix: str, kinds: str, shape: Sequence[int | None]) -> npt.NDArray[Any]:
        """The numbers of one. kinds: of NumPy's letters (``iuf``), how they may be stored; shape: None: any size.

        Raises: UsageError if it is not there, or of another type or shape.
        """
        tensor = self.by_suffix.get(suffix)
        if tensor is None:
            raise refused(
                f"'{self.base}' without its {suffix}" if self.base else f"no {suffix}", "every part of each weight"
            )
        array = tensor.array()
        if kind_of(array) not in kinds:
            raise refused(f"'{tensor.name}' of type {tensor.dtype}", "integers" if "f" not in kinds else "numbers")
        if len(shape) != array.ndim or any(
            want not in (None, have) for want, have in zip(shape, array.shape, strict=True)
        ):
            wanted = " x ".join("any" if size is None else str(size) for size in shape)
            raise refused(f"'{tensor.name}' {list(tensor.shape)}", f"{wanted}, as its other parts say")
        return array

    def words(self, suffix: str, shape: Sequence[int | None]) -> npt.NDArray[Any]:
        """Packed integers of one, int32.

        Raises: UsageError if it is not there, or of another type or shape.
        """
        array = self.array(suffix, "i", shape)
        tensor = self.by_suffix[suffix]
        if array.dtype.itemsize != WORD_BYTES:
            raise refused(f"'{tensor.name}' of type {tensor.dtype}", "I32")
        if not array.size:
            raise refused(f"'{tensor.name}' {list(tensor.shape)}", "at least one word")
        return array

    def scales(self, suffix: str, shape: Sequence[int | None]) -> Callable[[], Floats]:
        """Reader of scales as float32.

        Raises: UsageError if they are not there, of another shape, or not finite.
        """
        array = self.array(suffix, "f", shape)
        if not np.isfinite(np.asarray(array, np.float32)).all():
            raise refused(f"'{self.by_suffix[suffix].name}' with NaN or Inf", "finite scales")
        return lambda: np.asarray(array, np.float32)


def kind_of(array: npt.NDArray[Any]) -> str:
    """NumPy's letter for a type; ``f`` for bfloat16, ``8`` for floating point of 8 bits."""
    if array.dtype.name.startswith("float8"):
        return "8"
    return "f" if array.dtype.name == "bfloat16" else array.dtype.kind


def grouped(
    tensors: Mapping[str, FileTensor], suffixes: Sequence[str], leading: str
) -> tuple[list[Parts], dict[str, FileTensor]]:
    """Tensors by what stands before their suffix, where there is one with the suffix `leading`, and all others.

    Raises: UsageError naming parts without the leading one.
    """
    found: dict[str, dict[str, FileTensor]] = {}
    others: dict[str, FileTensor] = {}
    for name, tensor in tensors.items():
        suffix = next((one for one in suffixes if name.endswith(f".{one}")), None)
        if suffix is None:
            others[name] = tensor
        else:
            found.setdefault(name.removesuffix(f".{suffix}"), {})[suffix] = tensor
    strays = [tensor.name for parts in found.values() if leading not in parts for tensor in parts.values()]
    if strays:
        raise refused(f"{listed(strays)} without its {leading}", "every part of each weight")
    return [Parts(base, parts) for base, parts in found.items()], others


def joined(others: Mapping[str, FileTensor], made: Iterable[FileTensor]) -> dict[str, FileTensor]:
    """All tensors of a model. made: those that others stand for.

    Raises: UsageError if the file has one of these a second time.
    """
    result = dict(others)
    for tensor in made:
        if tensor.name in result:
            raise refused(f"'{tensor.name}' twice: by itself and as quantised parts", "one of them")
        result[tensor.name] = tensor
    return result


def refused(
    received: str, expected: str, fix: str = "download the model again, or export its floating-point original"
) -> UsageError:
    """Quantised weights that cannot be taken as they are."""
    return UsageError(problem("quantised weights", received=received, expected=expected, fix=fix))
