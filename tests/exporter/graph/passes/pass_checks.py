"""What tests of graph passes share: graphs from ONNX's text form, and what holds before and after a pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import common
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.operators import DOMAIN
from sinkexport.util.node_fields import read_fields

from tests.exporter.graph.cpu_evaluator import CPU_NODES
from tests.exporter.graph.plugin_evaluator import (
    GatedActivation,
    HalfExpertLinear,
    HalfLinear,
    Int4ExpertLinear,
    Int4Linear,
    Int4Rows,
    Int8ExpertLinear,
    Int8Linear,
    Int8Rows,
    RmsNorm,
)

INT4_PLUGINS = [Int4ExpertLinear, Int4Linear, Int4Rows]
PLUGINS = [
    GatedActivation,
    HalfExpertLinear,
    HalfLinear,
    Int8ExpertLinear,
    Int8Linear,
    Int8Rows,
    RmsNorm,
    *INT4_PLUGINS,
]
TYPES = {"float32": "float", "float64": "double"}


def parsed(
    body: str, inputs: str, outputs: str, constants: str = "", *, opset: int = 24, ir_version: int = 11
) -> ir.Model:
    """A graph from ONNX's text form, shapes inferred. constants: initializers, and types of values between nodes."""
    head = f'<ir_version: {ir_version}, opset_import: ["" : {opset}, "{DOMAIN}" : 1]>'
    text = f"{head} g ({inputs}) => ({outputs}) <{constants}> {{{body}}}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), strict_mode=True))


def written(name: str, array: np.ndarray) -> str:
    """An initializer in the text form, which has the bits of float16 numbers."""
    kind = TYPES.get(str(array.dtype), str(array.dtype))
    values = array.view(np.uint16) if array.dtype == np.float16 else array
    shape = ",".join(map(str, array.shape))
    return f"{kind}[{shape}] {name} = {{{', '.join(map(repr, values.reshape(-1).tolist()))}}}"


def numbers(*shape: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """Random numbers that float16 holds exactly."""
    return (np.random.default_rng(seed).integers(-64, 64, shape) / 32).astype(dtype)


def kinds(model: ir.Model) -> list[str]:
    """Operators of the nodes that something reads, sorted."""
    common.RemoveUnusedNodesPass()(model)
    return sorted(node.op_type for node in model.graph)


def evaluated(model: ir.Model, inputs: dict[str, np.ndarray]) -> list[Any]:
    """What ONNX's reference evaluator computes, nodes of the plugins or of the CPU library in NumPy."""
    common.NameFixPass()(model)
    common.TopologicalSortPass()(model)
    nodes = CPU_NODES if any("layout" in read_fields(node) for node in model.graph) else PLUGINS
    return ReferenceEvaluator(ir.to_proto(model), new_ops=nodes).run(None, inputs)


def random_inputs(model: ir.Model, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Normal numbers for every floating-point input, zeros for others."""
    random = np.random.default_rng(0)
    found = {}
    for value in model.graph.inputs:
        shape, dtype = value.shape.numpy(), value.dtype.numpy()
        array = random.normal(size=shape) * scale if value.dtype.is_floating_point() else np.zeros(shape)
        found[str(value.name)] = array.astype(dtype)
    return found


def check_same_results(
    model: ir.Model, under_test: GraphPass, inputs: dict[str, np.ndarray] | None = None, *, rtol: float = 1e-6
) -> None:
    """A pass changes the graph, not what it computes; once more it changes nothing."""
    given = random_inputs(model) if inputs is None else inputs
    before = evaluated(model, given)
    assert under_test(model).modified
    after = evaluated(model, given)
    assert len(before) == len(after)
    for got, want in zip(after, before, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(
            got.astype(np.float64), want.astype(np.float64), rtol=rtol, atol=rtol * np.abs(want).max()
        )
    check_left_alone(model, under_test)


def check_left_alone(model: ir.Model, under_test: GraphPass) -> None:
    """A pass says that it changed nothing, and has not."""
    before = _without_node_names(model)
    assert not under_test(model).modified
    assert _without_node_names(model) == before


def _without_node_names(model: ir.Model) -> str:
    proto = ir.to_proto(model)
    for node in proto.graph.node:
        node.ClearField("name")
    return str(proto)
