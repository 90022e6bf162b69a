"""A model that streams -> an ONNX graph in traced operators: each kind of decoder layer traced twice, or all layers."""

from __future__ import annotations

import logging

import onnx_ir as ir

from sinkexport.families.refusals import refusing
from sinkexport.graph.convert import convert
from sinkexport.graph.stamp_layers import stamp_layers
from sinkexport.model.decoder import StreamStep
from sinkexport.model.derived_constants import derived_constants
from sinkexport.model.layer_kinds import LayerRepeats, layer_repeats
from sinkexport.model.repeated_layers import repeated_constants
from sinkexport.model.tracing import trace
from sinkexport.util.derived_constant import DerivedConstant

LOGGER = logging.getLogger("sinkexport")

Traced = tuple[ir.Model, list[DerivedConstant]]
"""A graph in traced operators, and what it computes of parameters."""


def traced_graph(step: StreamStep, role: str) -> Traced:
    """Trace and convert one run of a model.

    Layers that repeat others are not traced where that is surely the same; otherwise all layers are.

    Raises: UsageError as `trace` and `convert`.
    """
    repeats = layer_repeats(step)
    if repeats is not None:
        try:
            return _stamped(step, repeats)
        except Exception as error:
            LOGGER.debug("sinkexport: every layer of the %s graph is traced: %s", role, error)
    with refusing(step.model, f"tracing the {role} graph"):
        program = trace(step)
        derived = derived_constants(program)
    with refusing(step.model, f"converting the {role} graph to ONNX"):
        return convert(program), derived


def _stamped(step: StreamStep, repeats: LayerRepeats) -> Traced:
    """The graph with copies of the layers that repeat."""
    step.repeats = repeats
    try:
        program = trace(step)
    finally:
        step.repeats = None
    model = convert(program)
    tensors = {**program.constants, **program.state_dict}
    stamp_layers(model, repeats, tensors, [layer for layer, _, _ in step.state_names])
    traced = derived_constants(program)
    return model, [*traced, *repeated_constants(program, repeats, traced)]
