"""Graphs of one ExpertMatmul, for tests of the passes that take them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes import common
from sinkexport.graph.operators import DOMAIN, EXPERT_MATMUL

E, K, M = 5, 48, 20


def expert_graph(
    weight: np.ndarray, shape: tuple[int, ...], picks: int | None, *, is_transposed: bool, in_place: bool = False
) -> ir.Model:
    """weight: [E, M, K], or [E, K, M] if `is_transposed`. shape: of x, [R, K] or, of all experts, [1 or E, n, K]."""

    def value(name: str, dtype: ir.DataType, *shape: int, tensor: Any = None) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)

    dtype = ir.DataType.from_numpy(weight.dtype)
    x = value("x", dtype, *shape)
    matrices = value("model.experts.w", dtype, *weight.shape, tensor=ir.Tensor(weight))
    chosen = None if picks is None else value("picks", ir.DataType.INT64, picks)
    attributes = {"is_transposed": int(is_transposed), "in_place": int(in_place)}
    node = ir.node(EXPERT_MATMUL, [x, matrices, chosen], attributes, domain=DOMAIN)
    out = node.outputs[0]
    out.name, out.dtype, out.shape = "y", dtype, ir.Shape((E, shape[1], M) if picks is None else (picks, M))
    inputs = [x] if chosen is None else [x, chosen]
    return ir.Model(
        ir.Graph(inputs, [out], nodes=[node], initializers=[matrices], opset_imports={"": 24, DOMAIN: 1}), ir_version=11
    )


def cases() -> Iterator[tuple[tuple[int, ...], int | None, bool]]:
    """Shape of x, number of picks, is_transposed."""
    for is_transposed in (False, True):
        for shape, picks in (
            ((4, K), 4),
            ((1, K), 3),
            ((2, K), 6),
            ((1, 4, K), None),
            ((E, 4, K), None),
            ((1, 1, K), None),
        ):
            yield shape, picks, is_transposed


class Operands:
    """Weights, inputs with one massive token, and what their matmul is."""

    def __init__(self, shape: tuple[int, ...], picks: int | None, *, is_transposed: bool) -> None:
        random = np.random.default_rng(len(shape))
        self.is_transposed = is_transposed
        self.weight = random.standard_normal((E, K, M) if is_transposed else (E, M, K)).astype(np.float32)
        self.x = random.standard_normal(shape).astype(np.float32)
        self.x.reshape(-1, K)[0] *= 1000.0  # a massive token must not cost the others their precision
        self.picks = None if picks is None else np.array([4, 0, 4, 2, 3, 1])[:picks]
        self.taken = self.weight if self.picks is None else self.weight[self.picks]
        wide = self.x.astype(np.float64)
        self.rows = wide if picks is None else np.repeat(wide, picks // len(wide), axis=0)[:, None]
        self.inputs = {"x": self.x} | ({} if self.picks is None else {"picks": self.picks})

    def matmul(self, matrices: np.ndarray) -> np.ndarray:
        """The result with other matrices, in float64."""
        out = self.rows @ (matrices if self.is_transposed else matrices.transpose(0, 2, 1))
        return out if self.picks is None else out[:, 0]


def run(model: ir.Model, **inputs: np.ndarray) -> np.ndarray:
    """The graph's result, by ONNX Runtime."""
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.NameFixPass()(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: inputs[i.name] for i in session.get_inputs()})[0]
