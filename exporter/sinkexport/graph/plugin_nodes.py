"""What nodes of the TensorRT plugins have in common, and what the kernels behind them take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import onnx_ir as ir
from sinkrt.errors import UsageError, problem

PLUGIN_ATTRIBUTES: Mapping[str, str] = {"plugin_version": "1", "plugin_namespace": ""}
"""Attributes of every node: by them and its name TensorRT's parser finds the plugin."""

HEAD_DIMS = (64, 80, 96, 128, 256)
MAX_BATCH = 64
MAX_CAPACITY = 65536
"""What the attention kernels are compiled for: plugins/kernels/sink_attention.h."""


USE_NATIVE = "use --native, which needs no plugin"


class NoPluginFormError(UsageError, ValueError):
    """A graph that TensorRT 8.5's parser with the plugins does not take, though the model is understood."""


def no_plugin_form(received: str) -> NoPluginFormError:
    """The refusal of a graph for `received`, which neither TensorRT 8.5's parser nor a plugin has."""
    expected = "what TensorRT 8.5 and the plugin compute"
    return NoPluginFormError(problem("target tensorrt", received=received, expected=expected, fix=USE_NATIVE))


def refuse_no_attention() -> NoReturn:
    """Refuse a model without attention: its graph has nothing for the plugin to do.

    Raises: UsageError.
    """
    raise UsageError(
        problem(
            "model",
            received="no attention, and target tensorrt with the plugin",
            expected="a model that attends",
            fix=USE_NATIVE,
        )
    )


def refuse_geometry(head_dim: int, batch: int, capacity: int) -> None:
    """Refuse what the kernels behind the plugin cannot do, before minutes are spent.

    Raises: UsageError.
    """
    if head_dim not in HEAD_DIMS:
        raise UsageError(
            problem(
                "head size",
                received=head_dim,
                fix=USE_NATIVE,
                expected="one that the plugin has kernels for: " + ", ".join(map(str, HEAD_DIMS)),
            )
        )
    if batch > MAX_BATCH:
        raise UsageError(
            problem(
                "batch",
                received=batch,
                expected=f"at most {MAX_BATCH} with the plugin",
                fix=f"lower --batch, or {USE_NATIVE}",
            )
        )
    if capacity > MAX_CAPACITY:
        raise UsageError(
            problem(
                "sinks + window",
                received=f"{capacity} tokens",
                fix=f"lower --window, or {USE_NATIVE}",
                expected=f"at most {MAX_CAPACITY} tokens with the plugin",
            )
        )


def is_plugin(node: ir.Node) -> bool:
    """Whether a node is in the form that a plugin takes."""
    return "plugin_version" in node.attributes
