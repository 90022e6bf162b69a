"""Fields of a node of this project's libraries: its attributes, or all of them in one attribute."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

FIELDS = "fields"
"""Attribute with all fields of a node, as ``name=value`` with commas between them and in the names' order."""

Field = int | float | str


def read_fields(node: ir.Node) -> dict[str, Field]:
    """Fields of a node by name, in whichever form it has them."""
    found = {name: attribute.value for name, attribute in node.attributes.items() if name != FIELDS}
    if FIELDS in node.attributes:
        pairs = (one.split("=", 1) for one in node.attributes[FIELDS].as_string().split(",") if "=" in one)
        found |= {name: _parsed(text) for name, text in pairs}
    return found


def shown_fields(fields: dict[str, Field]) -> str:
    """Value of the attribute FIELDS: floats in as many digits as distinguish them."""
    return ",".join(f"{name}={_shown(value)}" for name, value in sorted(fields.items()))


def _shown(value: Field) -> str:
    return repr(float(np.float32(value))) if isinstance(value, float) else str(value)


def _parsed(text: str) -> Field:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
