"""What the probe has to see by itself: faults that only many tokens, other streams or an option of attention show."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from sinkexport.families.probe import probe_attention
from sinkrt.errors import UsageError

from tests.exporter.tiny_models import tiny_model

Change = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]], tuple[Any, ...]]


def probed(model: Any) -> Any:
    return probe_attention(model, model.config.num_hidden_layers, 16)[0]


def wrapped(module: Any, change: Callable[..., Any]) -> None:
    """Let a module return ``change(forward, ..)``."""
    forward = module.forward
    module.forward = lambda *arguments, **named: change(forward, *arguments, **named)


def changed_call(attention: Any, change: Change) -> None:
    """Let a module call its attention function with what `change` makes of q, k, v and the options."""
    source = sys.modules[type(attention).__module__]
    functions = source.ALL_ATTENTION_FUNCTIONS

    def get_interface(name: str, default: Any) -> Any:
        inner = functions.get_interface(name, default)

        def call(module: Any, q: Any, k: Any, v: Any, mask: Any = None, **options: Any) -> Any:
            q, k, v, options = change(q, k, v, options)
            return inner(module, q, k, v, mask, **options)

        return call

    def run(forward: Any, *arguments: Any, **named: Any) -> Any:
        with mock.patch.object(source, "ALL_ATTENTION_FUNCTIONS", mock.Mock(get_interface=get_interface)):
            return forward(*arguments, **named)

    wrapped(attention, run)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("llama", "scaling", lambda k, given: given * math.log(1 + k.shape[2])),
        ("qwen3_next", "scaling", lambda k, given: given * math.log(1 + k.shape[2])),
        ("gemma2", "softcap", lambda k, _: 1.0 + k.shape[2]),
        ("gpt_oss", "s_aux", lambda k, given: given + 3 * k.mean()),
    ],
)
def test_options_that_depend_on_other_tokens_are_refused(name: str, option: str, value: Any) -> None:
    model = tiny_model(name)
    layer = model.model.layers[-1]
    changed_call(layer.self_attn, lambda q, k, v, options: (q, k, v, {**options, option: value(k, options[option])}))
    with pytest.raises(UsageError, match=f"earlier tokens change '{option}' of layer 1"):
        probed(model)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("llama", "model.layers.1.mlp"),
        ("lfm2", "model.layers.1.feed_forward"),
        ("mamba2", "backbone.layers.0.mixer.in_proj"),
        ("rwkv", "rwkv.ln_out"),
        ("recurrent_gemma", "lm_head"),
    ],
)
def test_streams_that_see_each_other_are_refused(name: str, module: str) -> None:
    model = tiny_model(name)
    wrapped(model.get_submodule(module), lambda forward, x: forward(x + 0.5 * (x.mean(0, keepdim=True) - x)))
    with pytest.raises(UsageError, match="other streams of a batch change"):
        probed(model)


def test_tokens_that_are_dropped_once_there_are_many_are_refused() -> None:
    model = tiny_model("llama")
    wrapped(model.model.layers[1].mlp, lambda forward, x: forward(x) * ((x[..., :1] > 0).long().cumsum(1) <= 4))
    with pytest.raises(UsageError, match="earlier tokens change logits"):
        probed(model)


def test_frequencies_that_hidden_states_change_are_refused() -> None:
    model = tiny_model("llama")

    def turn(forward: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = forward(x, position_ids)
        angles = torch.atan2(sin, cos) * 2 * x.mean(dim=-1, keepdim=True).sigmoid()
        return angles.cos(), angles.sin()

    wrapped(model.model.rotary_emb, turn)
    with pytest.raises(UsageError, match="cos and sin that hidden states change"):
        probed(model)


@pytest.mark.parametrize(("threshold", "shares"), [(3.2, None), (float("inf"), 0)])
def test_keys_that_most_tokens_share_are_not_shared(threshold: float, shares: int | None) -> None:
    """Few tokens have values above the first threshold, and none above the second."""
    model, kept = tiny_model("llama-mha"), []

    def keep(q: Any, k: Any, v: Any, options: Any) -> tuple[Any, ...]:
        kept[:] = [k, v]
        return q, k, v, options

    def take(q: Any, k: Any, v: Any, options: Any) -> tuple[Any, ...]:
        is_own = v[:, :1, :, :1] > threshold
        return q, torch.where(is_own, k, kept[0]), torch.where(is_own, v, kept[1]), options

    changed_call(model.model.layers[0].self_attn, keep)
    changed_call(model.model.layers[1].self_attn, take)
    assert probed(model).calls[1].shares == shares


def test_a_matrix_whose_output_is_clipped_makes_no_latent() -> None:
    model = tiny_model("deepseek_v3")
    wrapped(model.model.layers[0].self_attn.kv_b_proj, lambda forward, x: forward(x).clamp(-3.6, 3.6))
    calls = probed(model).calls
    assert calls[0].latent is None
    assert calls[1].latent is not None


def test_a_layer_that_does_not_follow_the_rule_of_its_class_is_refused() -> None:
    model = tiny_model("rwkv")
    wrapped(model.rwkv.blocks[1].feed_forward, lambda forward, x, *others, **named: forward(1.1 * x, *others, **named))
    with pytest.raises(UsageError, match="layers that do not follow the rule of their class: it changes logits"):
        probed(model)
