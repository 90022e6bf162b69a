"""Experts that loop over those that are chosen, against the same with static shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sinkexport.model.loop_experts import loop_experts, unrolled_experts
from sinkexport.model.moe_layers import moe_layers, routers

from tests.exporter.tiny_models import tiny_model

COUNTS = {"dbrx": 4, "jetmoe": 9, "longcat_flash": 4}
"""Experts of a layer that have weights."""


def _logits(model: Any, num_tokens: int) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.arange(3, 3 + num_tokens)[None], use_cache=False).logits
    return logits


@pytest.mark.parametrize("num_tokens", [1, 2, 7])
@pytest.mark.parametrize("name", COUNTS)
def test_equals_the_loop(name: str, num_tokens: int) -> None:
    """Few tokens are gathered for, many go through all experts."""
    model = tiny_model(name)
    names = [name for name, _ in model.named_parameters()]
    wanted = _logits(model, num_tokens)
    with unrolled_experts(model):
        got = _logits(model, num_tokens)
    assert float((got - wanted).abs().max()) < 1e-4 * float(wanted.std())
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(_logits(model, num_tokens), wanted)


@pytest.mark.parametrize("name", COUNTS)
def test_shapes_do_not_depend_on_data(name: str) -> None:
    model = tiny_model(name)
    with unrolled_experts(model), torch.no_grad():
        torch.export.export(model, (torch.zeros(1, 1, dtype=torch.int64),), {"use_cache": False}, strict=False)


@pytest.mark.parametrize("name", COUNTS)
def test_layers_and_routers(name: str) -> None:
    model = tiny_model(name)
    layers = moe_layers(model)
    assert layers == loop_experts(model)
    assert set(layers.values()) == {COUNTS[name]}
    if name != "longcat_flash":  # whose router chooses among more than have weights
        assert len(routers(model)) == len(layers)


def test_identities_take_their_share() -> None:
    """LongCat-Flash: experts beyond those with weights hand on their input."""
    model = tiny_model("longcat_flash")
    layer = model.model.layers[0].mlp.experts
    hidden, shares = torch.randn(3, 48), torch.rand(3, 2)
    with unrolled_experts(model):
        got = layer(hidden, torch.full((3, 2), layer.down_proj.shape[0]), shares)
    assert torch.allclose(got, hidden * shares.sum(dim=-1, keepdim=True), atol=1e-6)
