"""A traced run of a model -> an ONNX model of a bundle, by torch's converter and the passes of this package."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Iterator, Sequence

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from sinkrt.contract import GraphSpec, StateSpec, TensorSpec
from sinkrt.errors import UsageError, problem

from sinkexport.graph.attention.expand import expand_operators
from sinkexport.graph.edit import known_shape
from sinkexport.graph.matmuls import module_of
from sinkexport.graph.operators import translations
from sinkexport.graph.passes.constants import complete_shapes, fold_small_constants
from sinkexport.graph.passes.experts import expand_experts, quantize_experts
from sinkexport.graph.passes.half_linear import use_half_linear
from sinkexport.graph.passes.norms import fuse_rms_norms
from sinkexport.graph.passes.opset17 import lower_to_opset_17
from sinkexport.graph.passes.packed_heads import pack_heads
from sinkexport.graph.passes.plugin_experts import use_expert_plugins
from sinkexport.graph.passes.plugin_gates import use_gate_plugins
from sinkexport.graph.passes.plugin_norms import use_norm_plugins
from sinkexport.graph.passes.plugin_operators import use_plugins
from sinkexport.graph.passes.smooth import smooth
from sinkexport.graph.passes.static_reshape import make_reshapes_static
from sinkexport.graph.passes.weights import fold_weight_transposes, merge_projections
from sinkexport.graph.quantize.ort import OrtForm
from sinkexport.graph.quantize.plugin import PluginForm
from sinkexport.graph.quantize.qdq import QdqForm
from sinkexport.graph.quantize.rewrite import Plan, quantize
from sinkexport.graph.weight_bytes import weight_bytes

OPSET = 24
IR_VERSION = 11
"""ONNX 1.19, the first with opset 24."""

WEIGHTS_FILE = "weights.bin"


@dataclasses.dataclass(frozen=True)
class BuiltGraph:
    """An ONNX model that still holds its weights by reference, and what the manifest says of it."""

    model: ir.Model
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...]

    def spec(self, file: str) -> GraphSpec:
        """The manifest's entry, once the graph has a file."""
        num_tokens = known_shape(self.model.graph.inputs[0])[1]
        return GraphSpec(file, num_tokens, self.inputs, self.outputs, weight_bytes(self.model))


def build_graph(
    program: torch.export.ExportedProgram,
    role: str,
    state_names: Sequence[tuple[int, str, str]],
    target: str = "onnx",
    num_sinks: int = 0,
    plan: Plan | None = None,
    *,
    plugins: bool = False,
) -> BuiltGraph:
    """Convert a traced run into operators that `target` takes (``onnx | tensorrt``).

    role: ``decode`` or ``prefill``, the graph's name. state_names: layer, kind and name of each state, in the order of
    the trace's inputs: ids, position, the states, and num_valid if there is one.
    plugins: leave to TensorRT plugins what they do (target ``tensorrt`` only). plan: what to quantise; None: nothing.
    num_sinks: first tokens of a stream whose inputs it may treat apart.

    Raises: UsageError naming the torch operators that have no ONNX form, or a weight that cannot be quantised.
    """
    model = convert(program)
    fold_weight_transposes(model)  # first: folded as constants, weights would be copied and lose their names
    prepare(model)
    if not plugins:
        fuse_rms_norms(model)
    if plan is None:
        merge_projections(model)
    else:
        smooth(model, plan.divisors)
        merge_projections(model, lambda name: plan.kind(module_of(name)))
        form = OrtForm if target == "onnx" else PluginForm if plugins else QdqForm
        quantize(model, plan, form(model.graph, model.graph.inputs[1], num_sinks))
        if target == "onnx":
            quantize_experts(model, plan)
    if plugins:
        use_expert_plugins(model, plan)
    expand_experts(model)
    if plugins:
        use_half_linear(model)
        use_plugins(model)
        use_norm_plugins(model)
        use_gate_plugins(model)
        make_reshapes_static(model)
        pack_heads(model)
        lower_to_opset_17(model)
    else:
        expand(model, target)
    inputs, states = _name_tensors(model.graph, state_names)
    finish(model, role)
    outputs = tuple(tensor_spec(value) for value in model.graph.outputs[:1])
    return BuiltGraph(model, inputs, outputs, states)


def convert(program: torch.export.ExportedProgram) -> ir.Model:
    """The trace in ONNX's operators and this project's own.

    Raises: UsageError naming the torch operators that have no ONNX form.
    """
    with _quiet():
        try:
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                custom_translation_table=translations(),
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise UsageError(
                problem(
                    "model",
                    received=f"an operation that ONNX cannot express ({reason})",
                    expected="a supported family",
                    fix="see 'sinkexport inspect families'",
                )
            ) from error
    if converted is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    return converted.model


def prepare(model: ir.Model) -> None:
    """Shapes are known and small constants computed, which all other passes rely on."""
    fold_small_constants(model)
    complete_shapes(model)
    if any(node.op_type in ("Shape", "CastLike") for node in model.graph):  # of what had no shape or type before
        fold_small_constants(model)
        complete_shapes(model)
    make_reshapes_static(model)


def expand(model: ir.Model, target: str = "onnx") -> None:
    """Put standard operators in the place of this project's own."""
    model.ir_version = IR_VERSION
    expand_operators(model, target)
    make_reshapes_static(model)


def finish(model: ir.Model, name: str) -> None:
    """Drop what nothing uses, and name the graph. Inputs and outputs have their names."""
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    common.NameFixPass()(model)
    common.TopologicalSortPass()(model)
    model.producer_name, model.graph.name = "sinkexport", name


def _name_tensors(
    graph: ir.Graph, state_names: Sequence[tuple[int, str, str]]
) -> tuple[tuple[TensorSpec, ...], tuple[StateSpec, ...]]:
    """Give inputs and outputs the names of the contract; list the inputs that are no states, and the states."""
    num_states = len(state_names)
    ids, position, *rest = graph.inputs
    states, num_valid = rest[:num_states], rest[num_states:]
    logits, *next_states = graph.outputs
    ids.name, position.name, logits.name = "ids", "position", "logits"
    for value in num_valid:
        value.name = "num_valid"
    specs = []
    for (layer, kind, name), before, after in zip(state_names, states, next_states, strict=True):
        before.name, after.name = name, f"{name}.next"
        spec = tensor_spec(before)
        specs.append(StateSpec(layer, kind, spec.name, after.name, spec.shape, spec.dtype))
    return tuple(tensor_spec(value) for value in (ids, position, *num_valid)), tuple(specs)


def tensor_spec(value: ir.Value) -> TensorSpec:
    """Name, shape and type of a value, as manifests have them."""
    if value.dtype is None:
        raise ValueError(f"'{value.name}' has no type")
    return TensorSpec(str(value.name), known_shape(value), str(value.dtype.numpy()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's converter warns of packages that it does not need here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
