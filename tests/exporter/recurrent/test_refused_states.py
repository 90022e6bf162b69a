"""Recurrent layers that carry more or less than their states, or follow no known rule, are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sinkexport.families.probe import probe_attention
from sinkexport.families.recurrent import CACHE_ARGUMENTS
from sinkexport.recurrent import mamba1, mamba2
from sinkrt.errors import UsageError

from tests.exporter.tiny_models import tiny_model

MIXERS: dict[str, Callable[[Any], torch.nn.Module]] = {
    "lfm2": lambda model: model.model.layers[0].conv,
    "falcon_h1": lambda model: model.model.layers[1].mamba,
    "mamba2": lambda model: model.backbone.layers[1].mixer,
    "jamba": lambda model: model.model.layers[0].mamba,
}
"""One recurrent module of a tiny model."""


def probed(model: Any) -> Any:
    return probe_attention(model, model.config.num_hidden_layers, 16)


def changed(mixer: Any, change: str) -> None:
    """Make a mixer see the token before in the same call, or the call before, or forget its states after each call."""
    forward, last = mixer.forward, [torch.zeros(())]

    def run(hidden_states: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        if change == "forgets":
            caches = {name: None for name in CACHE_ARGUMENTS if name in named}
            assert caches
            return forward(hidden_states, *arguments, **named | caches)
        out = forward(hidden_states, *arguments, **named)
        if change == "leaks":
            return out + 0.1 * torch.nn.functional.pad(hidden_states, (0, 0, 1, 0))[:, :-1]
        before, last[0] = last[0], hidden_states.mean()
        return out + 0.1 * before

    mixer.forward = run


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("leaks", "a state beside attention: earlier tokens change"),
        ("remembers", "beside attention|outside attention|more than a rotation|outside the rotary"),
        ("forgets", "a state beside attention: earlier tokens change|while probing its attention"),
    ],
)
@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_with_more_or_less_than_its_states_is_refused(name: str, change: str, reason: str) -> None:
    model = tiny_model(name)
    probed(model)
    changed(MIXERS[name](model), change)
    with pytest.raises(UsageError, match=reason):
        probed(model)


@pytest.mark.parametrize(
    ("name", "rules", "scan"), [("mamba2", mamba2, "chunk_scan"), ("jamba", mamba1, "selective_scan")]
)
@pytest.mark.parametrize("change", ["drops a state", "leaks a token"])
def test_a_wrong_rule_is_refused(
    name: str, rules: Any, scan: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(rules, scan)

    def wrong(x: torch.Tensor, *arguments: torch.Tensor, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, after = right(x, *arguments, **named)
        return (out, 0.0 * after) if change == "drops a state" else (out + 0.1 * x.sum(dim=1, keepdim=True), after)

    model = tiny_model(name)
    with monkeypatch.context() as patch:
        patch.setattr(rules, scan, wrong)
        with pytest.raises(UsageError, match="a state beside attention: earlier tokens change"):
            probed(model)
    probed(model)


def test_an_unknown_rule_is_refused_by_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mamba2")
    monkeypatch.delattr("transformers.models.mamba2.modeling_mamba2.mamba2_selective_state_update")
    with pytest.raises(
        UsageError, match=r"those of a Mamba2Mixer in layer 0 \(conv 0, recurrent 0\), expected a known rule"
    ):
        probed(model)


def test_layers_with_different_limits_of_time_steps_are_refused() -> None:
    model = tiny_model("mamba2")
    model.backbone.layers[1].mixer.time_step_limit = (0.1, 1.0)
    with pytest.raises(UsageError, match="Mamba-2 layers with 2 limits of their time steps"):
        probed(model)
