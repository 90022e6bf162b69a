"""torch's table of ONNX forms, made quickly."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator

import onnxscript

PARSED = "function_ir"
"""Attribute of a function of the table. Reading it parses the function's source."""


@contextlib.contextmanager
def quick_table() -> Iterator[None]:
    """Let ``torch.onnx.export`` make its table of ONNX forms without parsing the source of each of 500 functions.

    It makes the table anew for each graph, and reads one word of what it parsed: the function's domain. Parsing takes
    a quarter of a tiny model's export. In an onnxscript that has no such attribute, nothing is changed.
    """
    functions = getattr(onnxscript, "TracedOnnxFunction", None)
    parsed = vars(functions).get(PARSED) if functions is not None else None
    if not isinstance(parsed, property):
        yield
        return
    setattr(functions, PARSED, property(lambda function: types.SimpleNamespace(domain=function.opset.domain)))
    try:
        yield
    finally:
        setattr(functions, PARSED, parsed)
