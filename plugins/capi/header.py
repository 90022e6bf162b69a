"""Structs and enumerations of kernels/*.h for ctypes: the headers are the only place where their fields are written."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).parents[1] / "kernels"
TYPES: dict[str, Any] = {
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "bool": ctypes.c_bool,
    "float": ctypes.c_float,
}
ENUMERATIONS = {"DType", "WeightType", "WindowType", "ScaleType", "Activation"}  # of int


def body(header: str, kind: str, name: str, folder: Path = KERNELS) -> str:
    """What stands between the braces of a struct or an enumeration, without comments.

    Raises:
        ValueError: the header has no such struct or enumeration.
    """
    text = re.sub(r"//.*", "", (folder / header).read_text(encoding="utf-8"))
    match = re.search(rf"{kind} {name}\b[^{{;]*{{(.*?)}};", text, re.DOTALL)
    if match is None:
        raise ValueError(f"{header}: received no {kind} {name}, expected one")
    return match[1]


def fields(header: str, struct: str, folder: Path = KERNELS) -> list[tuple[str, Any]]:
    """A struct's fields as ctypes wants them. Pointers are device addresses, 0 or None for null.

    Raises:
        ValueError: a field's type is none of those that parameters have.
    """
    result = []
    for declaration in filter(None, map(str.strip, body(header, "struct", struct, folder).split(";"))):
        match = re.fullmatch(r"(?:const )?(\w+)(\*?) (\w+)\s*=.*", declaration, re.DOTALL)
        if match is None or not (match[2] or match[1] in TYPES or match[1] in ENUMERATIONS):
            raise ValueError(f"{header}: received {declaration!r}, expected a number, an enumeration or a pointer")
        result.append((match[3], ctypes.c_void_p if match[2] else TYPES.get(match[1], ctypes.c_int)))
    return result


def values(header: str, enumeration: str, folder: Path = KERNELS) -> dict[str, int]:
    """An enumeration's values by name: kGeluTanh is gelu_tanh."""
    pairs = re.findall(r"k(\w+) = (\d+)", body(header, "enum class", enumeration, folder))
    return {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(): int(value) for name, value in pairs}


DTYPES = values("types.h", "DType")
WEIGHT_TYPES = values("linear.h", "WeightType")
ACTIVATIONS = values("gated_activation.h", "Activation")
