"""Inputs of linear layers as observers see them: against transformers' dense pass and the streaming reference."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from sinkexport.calibration.stream_inputs import StreamConfig, input_groups, stream_inputs
from sinkexport.reference.streaming import streaming_reference
from sinkrt.errors import UsageError

from tests.exporter.tiny_models import tiny_model
from tests.support import random_ids


class Everything:
    """Keeps all inputs [n, K] by layer, and which tokens were called sinks."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.is_sink: dict[str, list[torch.Tensor]] = defaultdict(list)

    def update(self, module: str, inputs: torch.Tensor, is_sink: torch.Tensor) -> None:
        self.inputs[module].append(inputs.clone())
        self.is_sink[module].append(is_sink)

    def all(self, module: str) -> torch.Tensor:
        return torch.cat(self.inputs[module])


def hooked(model: Any, names: Any) -> tuple[dict[str, list[torch.Tensor]], list[Any]]:
    """torch's own hooks, all inputs as they come, each [B, T, K]."""
    found: dict[str, list[torch.Tensor]] = defaultdict(list)

    def hook(name: str) -> Any:
        return lambda _module, arguments: found[name].append(arguments[0].detach().clone())

    return found, [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]


def unhook(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", ["llama", "llama-mha", "gpt_neox", "phi", "phi3", "gemma2", "qwen3", "cohere"])
def test_before_the_window_fills_they_are_those_of_the_dense_model(name: str) -> None:
    model, pieces, seen = tiny_model(name), random_ids(2, 19), Everything()
    groups = input_groups(model)
    stream_inputs(model, pieces, StreamConfig(3, 16, chunk_tokens=5), [seen])
    want, handles = hooked(model, groups)
    with torch.no_grad():
        model(input_ids=torch.from_numpy(pieces))
    unhook(handles)
    assert set(seen.inputs) == set(groups)
    for group in groups:
        exact = want[group][0].reshape(-1, want[group][0].shape[-1])  # [pieces * L, K]
        assert (seen.all(group) - exact).abs().max() < 1e-4 * exact.std()
        assert torch.cat(seen.is_sink[group]).tolist() == ([True] * 3 + [False] * 16) * 2


@pytest.mark.parametrize(("num_sinks", "window", "chunk"), [(2, 5, 4), (0, 3, 7), (4, 6, 1), (1, 2, 30)])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "smollm3"])
def test_after_wraps_they_are_those_of_the_reference(name: str, num_sinks: int, window: int, chunk: int) -> None:
    model, pieces, seen = tiny_model(name), random_ids(2, 30), Everything()
    groups = input_groups(model)
    stream_inputs(model, pieces, StreamConfig(num_sinks, window, chunk), [seen], groups=groups)
    with streaming_reference(model, num_sinks, window) as reference:
        want, handles = hooked(model, groups)
        for ids in pieces:
            reference.reset()
            for token in ids:
                reference.step(torch.tensor([token]))
        unhook(handles)
    for group in groups:
        exact = torch.cat([step[0] for step in want[group]])
        assert (seen.all(group) - exact).abs().max() < 1e-4 * exact.std()


@pytest.mark.parametrize("name", ["llama", "phi", "phi3", "gpt_neox", "gemma2", "olmo2"])
def test_groups_are_the_layers_that_read_the_same_numbers(name: str) -> None:
    model = tiny_model(name)
    groups = input_groups(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(member for members in groups.values() for member in members) == sorted(linear)
    found, handles = hooked(model, linear)
    with torch.no_grad():
        model(input_ids=torch.from_numpy(random_ids(1, 9)))
    unhook(handles)
    leader = {member: first for first, members in groups.items() for member in members}
    for a in linear:
        for b in linear:
            same = found[a][0].shape == found[b][0].shape and torch.equal(found[a][0], found[b][0])
            assert same == (leader[a] == leader[b]), (a, b)


def test_groups_of_llama_by_name() -> None:
    groups = input_groups(tiny_model("llama"))
    layer = "model.layers.1."
    assert groups[f"{layer}self_attn.q_proj"] == tuple(f"{layer}self_attn.{p}_proj" for p in "qkv")
    assert groups[f"{layer}mlp.gate_proj"] == (f"{layer}mlp.gate_proj", f"{layer}mlp.up_proj")
    assert groups["lm_head"] == ("lm_head",)


def test_it_goes_on_after_a_piece_and_leaves_the_model_alone() -> None:
    model, pieces, config = tiny_model("llama"), random_ids(3, 20), StreamConfig(2, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole, first, rest = Everything(), Everything(), Everything()
    reports: list[tuple[str, int, int]] = []
    done: list[int] = []
    stream_inputs(model, pieces, config, [whole], lambda *a: reports.append(a), after_piece=done.append)
    stream_inputs(model, pieces[:1], config, [first])
    stream_inputs(model, pieces, config, [rest], first_piece=1)
    for group in whole.inputs:
        assert torch.equal(whole.all(group), torch.cat((first.all(group), rest.all(group))))
    assert done == [1, 2, 3]
    assert reports == [("stream", 20 * i, 60) for i in range(4)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_activations_that_are_not_finite_are_named() -> None:
    model, pieces = tiny_model("llama"), random_ids(1, 12)
    model.model.embed_tokens.weight.data[int(pieces[0, 7])] = torch.inf
    first = int(np.flatnonzero(pieces[0] == pieces[0, 7])[0])
    with pytest.raises(UsageError, match=rf"inputs of 'model\.layers\.0\.self_attn\.q_proj'.*at position {first},"):
        stream_inputs(model, pieces, StreamConfig(1, 4, chunk_tokens=3), [Everything()])
    assert not any(module._forward_pre_hooks for module in model.modules())
