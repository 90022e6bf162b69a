"""Comparison of ONNX graphs up to the names of nodes and of what is between them."""

from __future__ import annotations

import hashlib
from typing import Any

import onnx_ir as ir


def described(model: ir.Model) -> list[Any]:
    """Nodes in order, outputs and inputs, each value by where it comes from: equal for graphs that differ in names.

    Constants count by type, shape and content, those of the model by their names too.
    """
    graph = model.graph
    places: dict[ir.Value | None, Any] = {None: None}
    places |= {value: ("input", value.name, repr((value.dtype, value.shape))) for value in graph.inputs}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        content = hashlib.sha256(tensor.tobytes()).hexdigest()
        places[value] = (
            "constant",
            name if name.startswith("model.") else "",
            repr((tensor.dtype, tensor.shape)),
            content,
        )
    found: list[Any] = []
    for number, node in enumerate(graph):
        inputs = [places[value] for value in node.inputs]
        attributes = sorted(
            (name, str(one.type), one.value.tobytes() if one.type == ir.AttributeType.TENSOR else repr(one.value))
            for name, one in node.attributes.items()
        )
        found.append((node.domain, node.op_type, inputs, attributes, [repr((o.dtype, o.shape)) for o in node.outputs]))
        places |= {output: ("node", number, index) for index, output in enumerate(node.outputs)}
    return [*found, *((value.name, places[value]) for value in graph.outputs)]
