"""Layers that are left out of a trace and stamped from another: the graph is that of the full trace, or the full trace
is taken."""

from __future__ import annotations

import dataclasses
import logging
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from sinkexport.config import ExportConfig
from sinkexport.families.probe import probe_attention
from sinkexport.graph.convert import build_graph, convert
from sinkexport.graph.trace_graph import traced_graph
from sinkexport.model.decoder import StreamStep
from sinkexport.model.layer_kinds import layer_repeats
from sinkexport.model.tracing import trace
from sinkexport.quant.recipe import load_recipe
from sinkexport.targets import ONNX

from tests.exporter.graph.same_graph import described
from tests.exporter.tiny_models import tiny_model
from tests.support import export_model, nightly_but

CONFIG = ExportConfig(num_sink_tokens=2, window_size=14, chunk_size=3)
NUM_LAYERS = 6  # three of each kind where two alternate
ALTERNATING = {"num_hidden_layers": NUM_LAYERS, "layer_types": ["sliding_attention", "full_attention"] * 3}
MORE_LAYERS: dict[str, dict[str, Any]] = {
    "gemma3_text": ALTERNATING,
    "gpt_oss": ALTERNATING,
    "mpt": {"n_layers": NUM_LAYERS},
}
FALLBACK = "every layer of the"


def deep_model(name: str) -> Any:
    """A tiny model with more layers than the others have."""
    arguments = MORE_LAYERS.get(name, {"num_hidden_layers": NUM_LAYERS})
    return tiny_model(name, **arguments)


FAMILIES = ["llama", "gemma2", "gemma3_text", "qwen3", "mixtral", "gpt_oss", "gpt_neox", "mpt"]


def step_of(model: Any, num_tokens: int = 1) -> StreamStep:
    """The module that is traced, of one stream."""
    shape, rotary = probe_attention(model, model.config.get_text_config().num_hidden_layers, CONFIG.capacity)
    return StreamStep(model, CONFIG, shape, rotary, batch=1, num_tokens=num_tokens).eval()


def finished(model: ir.Model, step: StreamStep) -> list[Any]:
    """A graph after all passes, up to names."""
    return described(build_graph(model, "graph", step.state_names, ONNX).model)


def assert_same(step: StreamStep, caplog: pytest.LogCaptureFixture, *, is_stamped: bool) -> None:
    """The graph is that of the full trace, node for node. is_stamped: whether layers were left out on the way."""
    with caplog.at_level(logging.DEBUG, "sinkexport"):
        model, _derived = traced_graph(step, "decode")
    stamped = layer_repeats(step) is not None and FALLBACK not in caplog.text
    assert stamped == is_stamped, caplog.text
    assert finished(model, step) == finished(convert(trace(step)), step)


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("name", nightly_but(["gemma3_text", "mixtral", "mpt"], FAMILIES))
def test_families(name: str, num_tokens: int, caplog: pytest.LogCaptureFixture) -> None:
    """One kind of layer, kinds that alternate, experts, sink logits, ALiBi."""
    assert_same(step_of(deep_model(name), num_tokens), caplog, is_stamped=True)


def test_kinds_of_different_windows_and_thetas() -> None:
    """Layers of one sliding window and theta are of one kind."""
    model = deep_model("gemma3_text")
    repeats = layer_repeats(step_of(model))
    assert repeats is not None
    types_of = model.config.layer_types
    assert all(types_of[layer] == types_of[template] for layer, template in repeats.template_of.items())


def layers_of(model: Any) -> Any:
    return model.model.layers


def scaled_by_index(model: Any) -> None:
    """A forward that computes with the layer's index, as GPT-2's attention may."""

    def forward(self: Any, hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
        return type(self).forward(self, hidden_states, **others) * (1 + self.index / 16)

    for index, layer in enumerate(layers_of(model)):
        layer.index = index
        layer.forward = types.MethodType(forward, layer)


def branching_on_index(model: Any) -> None:
    """A forward that looks its index up in a table: traces of the first layers are alike."""
    table = [1.0, 1.0, 1.0, 2.0, 1.0, 1.0]

    def forward(self: Any, hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
        return type(self).forward(self, hidden_states, **others) * table[self.self_attn.layer_idx]

    for layer in layers_of(model):
        layer.forward = types.MethodType(forward, layer)


def scaled_by_attribute(model: Any) -> None:
    """A number of each layer that is no parameter."""
    for index, layer in enumerate(layers_of(model)):
        layer.self_attn.scaling = 0.25 + index / 64


def scaled_by_closure(model: Any) -> None:
    """A number that a layer's own function holds."""
    for index, layer in enumerate(layers_of(model)):
        inner = layer.mlp.act_fn

        class Scaled(torch.nn.Module):
            def __init__(self, scale: Callable[[torch.Tensor], torch.Tensor]) -> None:
                super().__init__()
                self.scale = scale

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.scale(x)

        layer.mlp.act_fn = Scaled(lambda x, inner=inner, index=index: inner(x) * (1 + index / 8))


def scaled_by_buffer(model: Any) -> None:
    """A buffer of each layer that no file has."""
    for index, layer in enumerate(layers_of(model)):
        layer.register_buffer("gain", torch.tensor(1 + index / 8), persistent=False)

    def forward(self: Any, hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
        return type(self).forward(self, hidden_states, **others) * self.gain

    for layer in layers_of(model):
        layer.forward = types.MethodType(forward, layer)


def passing_values_on(model: Any) -> None:
    """Each layer adds what the one before has left in an object that all share."""
    left: dict[str, torch.Tensor] = {}

    def forward(self: Any, hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
        result = type(self).forward(self, hidden_states, **others)
        before = left.get("result", result)
        left["result"] = result
        return result + before * 0.5

    def clear(*_: Any) -> None:
        left.clear()

    model.register_forward_pre_hook(clear)
    for layer in layers_of(model):
        layer.forward = types.MethodType(forward, layer)


def sharing_a_weight(model: Any) -> None:
    """A matrix that two layers share is not the template's own."""
    layers = layers_of(model)
    layers[4].mlp.up_proj.weight = layers[3].mlp.up_proj.weight


def counting_calls(model: Any) -> None:
    """A scale that depends on how often any layer has run."""
    count = [0]

    def forward(self: Any, hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
        count[0] += 1
        return type(self).forward(self, hidden_states, **others) * (1 + count[0] / 16)

    def clear(*_: Any) -> None:
        count[0] = 0

    model.register_forward_pre_hook(clear)
    for layer in layers_of(model):
        layer.forward = types.MethodType(forward, layer)


@pytest.mark.parametrize(
    ("change", "is_stamped"),
    [
        (scaled_by_index, False),
        (branching_on_index, False),
        (scaled_by_attribute, False),
        (scaled_by_closure, False),
        (scaled_by_buffer, True),
        (passing_values_on, False),
        (counting_calls, False),
        (sharing_a_weight, True),
    ],
)
def test_hidden_differences(change: Callable[[Any], None], is_stamped: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever tells layers apart is in the graph: looked up in each layer, or the full trace is taken."""
    model = deep_model("llama")
    change(model)
    assert_same(step_of(model), caplog, is_stamped=is_stamped)


def test_other_arguments(caplog: pytest.LogCaptureFixture) -> None:
    """A model that calls one layer with another tensor than the rest."""
    model = deep_model("llama")

    def add(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "position_ids": kwargs["position_ids"] + 0}

    layers_of(model)[4].register_forward_pre_hook(add, with_kwargs=True)
    assert_same(step_of(model), caplog, is_stamped=True)  # its hook makes it a kind of its own


def test_derived_constants(tmp_path: Path) -> None:
    """What the code computes of parameters, 1 + weight, is looked for in each layer; the graphs are the model's."""
    export_model(deep_model("gemma2"), tmp_path / "bundle", CONFIG, check=True)


def test_recipe(tmp_path: Path) -> None:
    """Each layer's own weights are quantised, and its own window."""
    config = dataclasses.replace(CONFIG, recipe=load_recipe("int8-window"))
    export_model(deep_model("llama"), tmp_path / "bundle", config, check=True)


def test_small_models_are_traced_whole() -> None:
    """Two layers of a kind have none to leave out."""
    assert layer_repeats(step_of(tiny_model("llama"))) is None
