"""MoE models in whole bundles. Their matmuls alone: passes/test_{expand,quantize}_experts.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from sinkexport.config import ExportConfig
from sinkexport.graph.quantize.recipe_plan import RecipePlan
from sinkexport.model.experts import declared_experts
from sinkexport.model.moe_layers import routers
from sinkexport.quant.recipe import load_recipe, parse_recipe

from tests.exporter.pipeline.test_families import exported
from tests.exporter.tiny_models import tiny_model
from tests.support import random_ids

MOE_FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "qwen3_next")  # 8 of 1, 5 of 2, 6 of 2 (transposed, biases), 4 of 2


@pytest.mark.parametrize("name", MOE_FAMILIES)
def test_biases_are_no_embeddings(name: str) -> None:
    """Rows of both are gathered."""
    model = tiny_model(name)
    plan = RecipePlan(load_recipe("int8-weights"), model, "float32")
    assert plan.table("model.embed_tokens") is not None
    for path, layer in declared_experts(model).items():
        for parameter, _ in layer.named_parameters():
            assert plan.table(f"{path}.{parameter}") is None


def with_rounded_experts(model: Any) -> Any:
    """8 bits with a scale for each output of each expert, in place, in torch."""
    with torch.no_grad():
        for module in declared_experts(model).values():
            for weight in (p for name, p in module.named_parameters() if p.ndim == 3):
                scale = weight.abs().amax(dim=1 if module.is_transposed else 2, keepdim=True) / 127
                weight.copy_((weight / scale).round() * scale)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", MOE_FAMILIES[:3])
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


@pytest.mark.slow
@pytest.mark.parametrize("name", MOE_FAMILIES)
def test_routers_are_found_and_stay_in_floating_point(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    found = routers(model)
    assert len(found) == len(declared_experts(model)) > 0
    with exported(model, tmp_path / "b", ExportConfig(2, 9, chunk_size=1, recipe=load_recipe("int8-weights"))):
        graph = onnx.load(tmp_path / "b" / "decode.onnx", load_external_data=False).graph
    kinds = {i.name.removeprefix("model."): i.data_type for i in graph.initializer}
    for router in found:
        assert {kind for name, kind in kinds.items() if name.startswith(router + ".weight")} == {onnx.TensorProto.FLOAT}
