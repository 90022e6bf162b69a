"""transformers' modules with explicit states: pieces of a text, some of them with a padded end, give the whole text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from sinkexport.families import refusal_of_config
from sinkexport.families.probe import probe_attention
from sinkexport.loading.checkpoints.no_effect import DECAYS, why_no_effect
from sinkexport.loading.checkpoints.weight_files import torch_tensor
from sinkexport.recurrent import lightning, mlstm, rg_lru, rwkv, zaya
from sinkexport.recurrent.modules import ModuleRule, TokenStates, explicit_states, layer_of
from sinkexport.recurrent.registry import MODULE_RULES
from sinkrt.errors import UsageError
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock
from transformers.models.rwkv.modeling_rwkv import RwkvFeedForward, RwkvSelfAttention
from transformers.models.xlstm.modeling_xlstm import xLSTMLayer
from transformers.models.zaya.modeling_zaya import ZayaCCAProjection

from tests.exporter.tiny_models import random_model, tiny_model

WIDTH, NUM_TOKENS = 24, 21


def make_rg_lru(*, taps: int = 4) -> tuple[Any, Callable[..., Any]]:
    config = transformers.RecurrentGemmaConfig(
        hidden_size=WIDTH, lru_width=30, num_attention_heads=3, conv1d_width=taps
    )
    block = RecurrentGemmaRecurrentBlock(config, 0)
    return block, lambda x: block(x, torch.arange(x.shape[1])[None], None, use_cache=False)[0]


def make_lightning() -> tuple[Any, Callable[..., Any]]:
    config = transformers.MiniMaxConfig(
        hidden_size=WIDTH, num_attention_heads=3, num_hidden_layers=2, head_dim=6, block_size=8
    )
    module = MiniMaxLightningAttention(config, 1)
    return module, lambda x: module(x, position_embeddings=None, attention_mask=None)[0]


def make_rwkv_attention() -> tuple[Any, Callable[..., Any]]:
    config = transformers.RwkvConfig(hidden_size=WIDTH, attention_hidden_size=18, num_hidden_layers=2)
    module = RwkvSelfAttention(config, 0)
    return module, lambda x: module(x)[0]


def make_rwkv_feed_forward() -> tuple[Any, Callable[..., Any]]:
    module = RwkvFeedForward(transformers.RwkvConfig(hidden_size=WIDTH, num_hidden_layers=2), 0)
    return module, lambda x: module(x)[0]


def make_xlstm() -> tuple[Any, Callable[..., Any]]:
    config = transformers.xLSTMConfig(
        hidden_size=WIDTH, num_heads=3, num_hidden_layers=1, chunk_size=16, qk_dim_factor=0.5, v_dim_factor=1.0
    )
    layer = xLSTMLayer(config)
    return layer, lambda x: layer(x)[0]


def make_zaya(*, bias: bool = True) -> tuple[Any, Callable[..., Any]]:
    config = transformers.ZayaConfig(
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        attention_bias=bias,
        cca_time0=3,
        cca_time1=2,
        num_hidden_layers=1,
    )
    module = ZayaCCAProjection(config, 0)
    return module, lambda x: torch.cat([part.flatten(2) for part in module(x, None)], dim=-1)


CASES = {
    "rg_lru": (make_rg_lru, rg_lru.RULES),
    "rg_lru without convolution": (lambda: make_rg_lru(taps=1), rg_lru.RULES),
    "lightning": (make_lightning, lightning.RULES),
    "rwkv attention": (make_rwkv_attention, rwkv.RULES),
    "rwkv feed-forward": (make_rwkv_feed_forward, rwkv.RULES),
    "xlstm": (make_xlstm, mlstm.RULES),
    "zaya": (make_zaya, zaya.RULES),
    "zaya without bias": (lambda: make_zaya(bias=False), zaya.RULES),
}


def made(case: str) -> tuple[Any, Callable[..., Any], Any, ModuleRule]:
    """A module with random weights, how to run it, the module in it that a rule is for, and the rule."""
    make, rules = CASES[case]
    torch.manual_seed(0)
    module, run = make()
    module.eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.4)
    by_name = {rule.class_name: rule for rule in rules}
    found = [(part, by_name[type(part).__name__]) for part in module.modules() if type(part).__name__ in by_name]
    assert len(found) == 1
    return module, run, *found[0]


def states_of(module: Any, rule: ModuleRule, batch: int) -> dict[Any, torch.Tensor]:
    return {key: torch.zeros(batch, *shape) for key, shape in rule.shapes(module).items()}


@pytest.mark.parametrize("sizes", [[21], [1] * 21, [3, 1, 8, 1, 1, 7], [16, 5]], ids=str)
@pytest.mark.parametrize("case", sorted(CASES))
def test_pieces_give_the_whole(case: str, sizes: list[int]) -> None:
    """Pieces of more than one token are padded by two that are none."""
    module, run, part, rule = made(case)
    x = torch.randn(1, NUM_TOKENS, WIDTH)
    states, outputs, at = states_of(part, rule, 1), [], 0
    with torch.no_grad():
        wanted = run(x)
        for size in sizes:
            padding = 2 if size > 1 else 0
            piece = torch.cat([x[:, at : at + size], torch.randn(1, padding, WIDTH)], dim=1)
            place = torch.arange(size + padding)[None]
            num_valid = torch.tensor([size]) if padding else None
            held = TokenStates(states, place < size, num_valid, at + place == 0)
            with explicit_states({part: (rule, held)}):
                outputs.append(run(piece)[:, :size])
            states, at = held.states, at + size
    torch.testing.assert_close(torch.cat(outputs, dim=1), wanted, rtol=1e-4, atol=1e-5)
    assert module is not None


@pytest.mark.parametrize("case", sorted(CASES))
def test_streams_without_a_token_stand_still_to_the_bit(case: str) -> None:
    _, run, part, rule = made(case)
    states = {key: torch.rand_like(x) for key, x in states_of(part, rule, 3).items()}
    for state in states.values():
        state[2] = 0.0  # a stream that has not begun
    held = TokenStates(
        dict(states), torch.tensor([[True], [False], [False]]), None, torch.zeros(3, 1, dtype=torch.bool)
    )
    with torch.no_grad(), explicit_states({part: (rule, held)}):
        out = run(torch.randn(3, 1, WIDTH))
    assert bool(out.isfinite().all())
    for key, before in states.items():
        assert torch.equal(held.states[key][1:], before[1:])
        assert not torch.equal(held.states[key][0], before[0])


def test_a_layer_of_an_outside_package_has_no_rule() -> None:
    """transformers takes xLSTM's blocks from the package xlstm where that is installed."""
    outside = type("mLSTMLayer", (torch.nn.Module,), {})()
    assert type(outside).__name__ not in {rule.class_name for rule in MODULE_RULES}


def test_hashed_ngrams_are_refused_by_the_configuration() -> None:
    config = tiny_model("qwen4_exp_text").config
    assert refusal_of_config(config) is None
    config.ple_layer_ids = [1]
    assert "hashed n-grams" in str(refusal_of_config(config))


def test_a_bias_for_every_distance_is_refused_in_one_line() -> None:
    config = transformers.models.inkling.configuration_inkling.InklingTextConfig(
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        d_rel=4,
        rel_extent=32,
        layer_types=["hybrid"],
        mlp_layer_types=["dense"],
        intermediate_size=64,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    )
    with pytest.raises(UsageError, match="a bias that each token computes for every distance, in layer 0"):
        probe_attention(random_model(config), 1, 18)


@pytest.mark.parametrize("name", DECAYS)
def test_decays_of_lightning_attention_are_those_of_its_rate(name: str) -> None:
    """A checkpoint has them: they change nothing if they are what the rate gives."""
    model = tiny_model("minimax")
    layer = model.model.layers[1].self_attn
    kind = f"model.layers.1.self_attn.{name}"
    assert why_no_effect(torch_tensor(kind, getattr(layer, name), "the model"), model) is not None
    assert why_no_effect(torch_tensor(kind, 0.5 * getattr(layer, name), "the model"), model) is None


def test_the_layer_is_in_the_name() -> None:
    assert layer_of("model.layers.12.self_attn") == 12
    assert layer_of("backbone.blocks.0.mlstm_layer.mlstm_backend") == 0
