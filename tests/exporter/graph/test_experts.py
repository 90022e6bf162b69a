"""Mixtures of experts: their products as one node, in standard operators and with INT8 weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx_ir.passes import common
from sinkexport.config import ExportConfig
from sinkexport.graph.operators import DOMAIN, EXPERT_PRODUCT
from sinkexport.graph.passes.experts import expand_experts, quantize_experts
from sinkexport.graph.quantize.recipe_plan import RecipePlan
from sinkexport.model.experts import expert_product, mixtures, routers
from sinkexport.quant.recipe import load_recipe, parse_recipe
from sinkexport.quant.weight import WeightScheme

from tests.exporter.pipeline.test_families import exported
from tests.exporter.tiny_models import tiny_model
from tests.support import random_ids, slow_but

E, K, M = 5, 48, 20
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "qwen3_next")  # 8 of 1, 5 of 2, 6 of 2 (transposed, biases), 4 of 2


class Plan:
    """Rounds all experts."""

    def experts(self, parameter: str) -> WeightScheme:
        assert parameter == "experts.w"
        return WeightScheme(8)


def run(model: ir.Model, **inputs: np.ndarray) -> np.ndarray:
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.NameFixPass()(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: inputs[i.name] for i in session.get_inputs()})[0]


def graph_of(weight: np.ndarray, shape: tuple[int, ...], picks: int | None, *, is_transposed: bool) -> ir.Model:
    """shape: of x, [R, K] or, of all experts, [1 or E, n, K]."""

    def value(name: str, dtype: ir.DataType, *shape: int, tensor: Any = None) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)

    x = value("x", ir.DataType.FLOAT, *shape)
    matrices = value("model.experts.w", ir.DataType.FLOAT, *weight.shape, tensor=ir.Tensor(weight))
    chosen = None if picks is None else value("picks", ir.DataType.INT64, picks)
    attributes = {"is_transposed": int(is_transposed), "in_place": 0}
    node = ir.node(EXPERT_PRODUCT, [x, matrices, chosen], attributes, domain=DOMAIN)
    out = node.outputs[0]
    out.name, out.dtype, out.shape = "y", ir.DataType.FLOAT, ir.Shape((E, shape[1], M) if picks is None else (picks, M))
    inputs = [x] if chosen is None else [x, chosen]
    return ir.Model(
        ir.Graph(inputs, [out], nodes=[node], initializers=[matrices], opset_imports={"": 24, DOMAIN: 1}), ir_version=11
    )


def cases() -> Iterator[tuple[tuple[int, ...], int | None, bool]]:
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


@pytest.mark.parametrize(("shape", "picks", "is_transposed"), cases())
def test_forms_of_a_product(shape: tuple[int, ...], picks: int | None, is_transposed: bool) -> None:
    random = np.random.default_rng(len(shape))
    weight = random.standard_normal((E, K, M) if is_transposed else (E, M, K)).astype(np.float32)
    x = random.standard_normal(shape).astype(np.float32)
    x.reshape(-1, K)[0] *= 1000.0  # a massive token must not cost the others their precision
    chosen = None if picks is None else np.array([4, 0, 4, 2, 3, 1])[:picks]
    taken = weight if chosen is None else weight[chosen]
    rows = x.astype(np.float64) if picks is None else np.repeat(x.astype(np.float64), picks // len(x), axis=0)[:, None]

    def of(matrices: np.ndarray) -> np.ndarray:
        out = rows @ (matrices if is_transposed else matrices.transpose(0, 2, 1))
        return out if picks is None else out[:, 0]

    want = of(taken)
    inputs = {"x": x} | ({} if chosen is None else {"picks": chosen})

    plain = graph_of(weight, shape, picks, is_transposed=is_transposed)
    expand_experts(plain)
    np.testing.assert_allclose(run(plain, **inputs), want, rtol=1e-4, atol=1e-3)
    torch_picks = None if chosen is None else torch.from_numpy(chosen)
    traced = expert_product(torch.from_numpy(x), torch.from_numpy(weight), torch_picks, is_transposed)
    np.testing.assert_allclose(traced.numpy(), want, rtol=1e-4, atol=1e-3)

    rounded = graph_of(weight, shape, picks, is_transposed=is_transposed)
    quantize_experts(rounded, Plan())
    got = run(rounded, **inputs)
    inner = 1 if is_transposed else 2
    scale = np.abs(taken).max(axis=inner, keepdims=True) / 127
    matrices = np.rint(taken / scale) * scale
    want = of(matrices)
    # An input is off by half a step at most: 2^-15 of the token's largest.
    sizes = np.abs(matrices).sum(axis=inner)[:, None, :]
    allowed = np.abs(rows).max(axis=-1, keepdims=True) * sizes / 2 / 16256
    allowed = (allowed if picks is None else allowed[:, 0]) + 1e-5 * np.abs(want)
    assert (np.abs(got - want) <= allowed + 1e-6).all()


def test_tokens_of_zeros() -> None:
    model = graph_of(np.ones((E, K, M), np.float32), (3, K), 3, is_transposed=True)
    quantize_experts(model, Plan())
    assert not run(model, x=np.zeros((3, K), np.float32), picks=np.array([0, 1, 2])).any()


@pytest.mark.parametrize("name", MIXTURES)
def test_biases_are_no_embeddings(name: str) -> None:
    """Rows of both are gathered."""
    model = tiny_model(name)
    plan = RecipePlan(load_recipe("int8-weights"), model, "float32")
    assert plan.table("model.embed_tokens") is not None
    for path, mixture in mixtures(model).items():
        for parameter, _ in mixture.named_parameters():
            assert plan.table(f"{path}.{parameter}") is None


def with_rounded_experts(model: Any) -> Any:
    """8 bits with a scale for each output of each expert, in place, in torch."""
    with torch.no_grad():
        for module in mixtures(model).values():
            for weight in (p for name, p in module.named_parameters() if p.ndim == 3):
                scale = weight.abs().amax(dim=1 if module.is_transposed else 2, keepdim=True) / 127
                weight.copy_((weight / scale).round() * scale)
    return model


@pytest.mark.parametrize("name", slow_but(1, MIXTURES[:3]))
def test_a_recipe_rounds_experts(name: str, tmp_path: Path) -> None:
    """Everything else is kept in floating point here, so that what is left is 15 bits of the inputs."""
    model, ids = tiny_model(name), random_ids(1, 40)
    raw = load_recipe("int8-weights").model_dump(exclude_none=True)
    others = [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    raw |= {"lm_head": "float", "embeddings": "float", "keep_float": others}
    config = ExportConfig(2, 9, chunk_size=4, recipe=parse_recipe(raw, "recipe 'test'"))
    with exported(model, tmp_path / "q", config) as session:
        steps = [session.step(column).copy() for column in ids.T]
        session.reset()
        chunks = session.prefill(ids).copy()
    with exported(with_rounded_experts(tiny_model(name)), tmp_path / "f", ExportConfig(2, 9, chunk_size=4)) as session:
        want = [session.step(column).copy() for column in ids.T]
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(steps, want, strict=True)]
    assert np.median(errors) < 1e-3
    assert np.linalg.norm(chunks - steps[-1]) < 1e-2 * np.linalg.norm(steps[-1])
    graph = onnx.load(tmp_path / "q" / "decode.onnx", load_external_data=False).graph
    kinds = {i.name.removeprefix("model."): i.data_type for i in graph.initializer}
    experts = [path for path, p in model.named_parameters() if p.ndim == 3 and ".experts." in path]
    assert len(experts) >= 2
    for path in experts:
        assert kinds[f"{path}.uint8"] == onnx.TensorProto.UINT8
        assert path not in kinds


@pytest.mark.parametrize("name", slow_but(1, MIXTURES))
def test_routers_are_found_and_stay_in_floating_point(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    found = routers(model)
    assert len(found) == len(mixtures(model)) > 0
    with exported(model, tmp_path / "b", ExportConfig(2, 9, chunk_size=1, recipe=load_recipe("int8-weights"))):
        graph = onnx.load(tmp_path / "b" / "decode.onnx", load_external_data=False).graph
    kinds = {i.name.removeprefix("model."): i.data_type for i in graph.initializer}
    for router in found:
        assert {kind for name, kind in kinds.items() if name.startswith(router + ".weight")} == {onnx.TensorProto.FLOAT}
