"""A traced run of a model -> an ONNX model of a bundle, by torch's converter and the passes of a target."""

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
from sinkrt.contract.constants import ROWS_SUFFIX, VERIFY
from sinkrt.errors import UsageError, problem

from sinkexport.graph.edit import known_shape, typed
from sinkexport.graph.graph_pass import PassContext, run_passes
from sinkexport.graph.quantize.plan import Plan
from sinkexport.graph.quick_decompositions import without_second_trace
from sinkexport.graph.state_order import check_state_order
from sinkexport.graph.torchlib import quick_table
from sinkexport.graph.translations import translations
from sinkexport.graph.weight_bytes import weight_bytes
from sinkexport.targets import Target

TRACED_OPSET = 24
"""What torch's converter writes and passes read."""

WEIGHTS_FILE = "weights.bin"


@dataclasses.dataclass(frozen=True)
class BuiltGraph:
    """An ONNX model that still holds its weights by reference, and its entries in the manifest."""

    model: ir.Model
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...]

    def spec(self, file: str) -> GraphSpec:
        """The manifest's entry, once the graph has a file."""
        num_tokens = known_shape(self.model.graph.inputs[0])[1]
        read = weight_bytes(self.model)
        return GraphSpec(file=file, num_tokens=num_tokens, inputs=self.inputs, outputs=self.outputs, weight_bytes=read)


def build_graph(
    model: ir.Model,
    role: str,
    state_names: Sequence[tuple[int, str, str]],
    target: Target,
    num_sinks: int = 0,
    plan: Plan | None = None,
) -> BuiltGraph:
    """Run the passes of `target` on a traced run that is converted, and name its tensors.

    role: ``decode``, ``prefill`` or ``verify``, the graph's name. state_names: layer, kind and name of each state, in
    the order of the trace's inputs: ids, position, the states, and num_valid if there is one.
    plan: what to quantise; None: nothing. num_sinks: first tokens of a stream that quantisation may treat apart.

    Raises: UsageError naming a weight that cannot be quantised, or a state that may be read after it is written;
        ValueError if the passes leave a graph that is not of the target's form.
    """
    verifies = role == VERIFY
    run_passes(model, target.passes, PassContext(target, plan, num_sinks, verifies))
    inputs, states = (_name_rows if verifies else _name_tensors)(model.graph, state_names)
    finish(model, role, target)
    _check_form(model, target)
    if not target.has_plugins and not verifies:
        check_state_order(model.graph, {state.input: state.output for state in states})
    outputs = tuple(tensor_spec(value) for value in model.graph.outputs[: None if verifies else 1])
    return BuiltGraph(model, inputs, outputs, states)


def convert(program: torch.export.ExportedProgram) -> ir.Model:
    """The trace in ONNX's operators and this project's own.

    Raises: UsageError naming the torch operators that have no ONNX form.
    """
    with _quiet(), quick_table():
        try:
            converted = torch.onnx.export(
                without_second_trace(program),
                dynamo=True,
                opset_version=TRACED_OPSET,
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


def finish(model: ir.Model, name: str, target: Target) -> None:
    """Drop what nothing uses, and name the graph. Inputs and outputs have their names."""
    model.ir_version = target.ir_version
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    common.NameFixPass()(model)
    common.TopologicalSortPass()(model)
    model.producer_name, model.graph.name = "sinkexport", name


def _check_form(model: ir.Model, target: Target) -> None:
    """Raises: ValueError if opset or inputs are not those that `target` declares."""
    ids, position = model.graph.inputs[:2]
    position_type = "int32 words" if len(known_shape(position)) == 2 else _dtype_name(position)
    found = (model.opset_imports[""], _dtype_name(ids), position_type)
    declared = (target.opset, target.ids, target.position)
    if found != declared:
        raise ValueError(f"target '{target.name}' declares {declared}, its passes leave {found}")


def _name_tensors(
    graph: ir.Graph, state_names: Sequence[tuple[int, str, str]]
) -> tuple[tuple[TensorSpec, ...], tuple[StateSpec, ...]]:
    """Give inputs and outputs the names of the contract; list other inputs, and states."""
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
        specs.append(
            StateSpec(layer=layer, kind=kind, input=spec.name, output=after.name, shape=spec.shape, dtype=spec.dtype)
        )
    return tuple(tensor_spec(value) for value in (ids, position, *num_valid)), tuple(specs)


def _name_rows(
    graph: ir.Graph, state_names: Sequence[tuple[int, str, str]]
) -> tuple[tuple[TensorSpec, ...], tuple[StateSpec, ...]]:
    """Do what `_name_tensors` does in a graph that verifies. It has the new rows of a state for the state itself.

    Sinks and a window of one type have the same rows, which come out once, named after the window.
    """
    ids, position, *rest = graph.inputs
    states, (num_valid,) = rest[: len(state_names)], rest[len(state_names) :]
    for value, name in ((ids, "ids"), (position, "position"), (num_valid, "num_valid"), (graph.outputs[0], "logits")):
        value.name = name
    rows, named = list(graph.outputs[1:]), set[ir.Value]()
    outputs = [graph.outputs[0]]
    for index in sorted(range(len(rows)), key=lambda i: state_names[i][1].startswith("sink")):
        (_, kind, name), before, row = state_names[index], states[index], rows[index]
        before.name = name
        if row in named:
            if kind.startswith("sink"):
                continue
            node = ir.node("Identity", [row])
            graph.append(node)
            row = typed(node.outputs[0], known_shape(row), row.dtype)
        row.name = f"{name}{ROWS_SUFFIX}"
        named.add(row)
        outputs.append(row)
    graph.outputs[:] = outputs
    return tuple(tensor_spec(value) for value in (ids, position, num_valid)), ()


def tensor_spec(value: ir.Value) -> TensorSpec:
    """Name, shape and type of a value, as manifests have them."""
    return TensorSpec(name=str(value.name), shape=known_shape(value), dtype=_dtype_name(value))


def _dtype_name(value: ir.Value) -> str:
    if value.dtype is None:
        raise ValueError(f"'{value.name}' has no type")
    return str(value.dtype.numpy())


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
