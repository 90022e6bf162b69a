"""Latent attention (MLA): how it is recognised, and that the absorbed form is the model's own attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sinkexport.families.interface import intercept_attention
from sinkexport.families.latent import KEYS, CachedPairs, Latent, Pair, find_latent
from sinkexport.families.recurrent import with_cache
from sinkexport.model.latent import absorbed, latent_parts, output_of_latents
from transformers import AutoConfig, AutoModelForCausalLM

NUM_TOKENS = 5
BASE = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "kv_lora_rank": 20,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}
DENSE = {"first_k_dense_replace": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("deepseek_v3", DENSE),
    "deepseek_v3-no-q-rank": ("deepseek_v3", {**DENSE, "q_lora_rank": None, "v_head_dim": 8}),
    "deepseek_v3-halves": ("deepseek_v3", {**DENSE, "rope_interleave": False, "attention_bias": True}),
    "deepseek_v3-yarn": ("deepseek_v3", {**DENSE, "rope_parameters": YARN, "kv_lora_rank": 33}),
    "minicpm3": ("minicpm3", {"v_head_dim": 6}),
    "youtu": ("youtu", {"qk_rope_head_dim": 2}),
    "glm4_moe_lite": ("glm4_moe_lite", {"mlp_layer_types": ["dense", "dense"]}),
}


def _model(name: str) -> Any:
    kind, others = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**BASE, **others})
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
    return model.double()


Call = tuple[torch.nn.Module, Pair, torch.Tensor, torch.Tensor, torch.Tensor, float]


def _calls(model: Any, batch: int = 2) -> list[Call]:
    """Module, cached pair, q, k, v and scale of each attention call on random tokens."""
    cache, calls = CachedPairs(), []

    def record(module: Any, q: Any, k: Any, v: Any, *_: Any, scaling: float, **__: Any) -> Any:
        calls.append((module, cache.take(module.layer_idx), q, k, v, scaling))
        return v.transpose(1, 2).contiguous(), None

    ids = torch.randint(0, 50, (batch, NUM_TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), intercept_attention(model, record):
        model(input_ids=ids, use_cache=False, **with_cache(model, cache))
    return calls


@pytest.fixture(scope="module", params=MODELS)
def calls(request: pytest.FixtureRequest) -> Iterator[list[Call]]:
    """Attention calls of one tiny model."""
    yield _calls(_model(request.param))


def test_absorbed_form_is_the_models_attention(calls: list[Call]) -> None:
    """Logits by rows, and rows summed up, give what keys and values do."""
    assert len(calls) == 2
    for module, cached, q, k, v, scale in calls:
        latent = find_latent(module, cached, q, k, v)
        assert latent is not None
        assert latent.weight == "kv_b_proj.weight"
        weights = (q @ k.mT * scale).softmax(dim=-1)
        with latent_parts(module, [latent]):
            query, row = absorbed(module, latent, cached, q)
            assert row.shape == (2, 1, NUM_TOKENS, latent.row_dim)
            by_row = (query @ row.mT * scale).softmax(dim=-1)
            out = output_of_latents(module, latent, (by_row @ row)[..., latent.rotary_dim :])
        torch.testing.assert_close(by_row, weights, rtol=0, atol=1e-12)
        torch.testing.assert_close(out, weights @ v, rtol=0, atol=1e-12)
        assert not hasattr(module.kv_b_proj, KEYS)


def test_parts_share_memory(calls: list[Call]) -> None:
    """No second copy of the matrix is made."""
    module, cached, q, k, v, _ = calls[0]
    latent = find_latent(module, cached, q, k, v)
    assert latent is not None
    weight = module.kv_b_proj.weight
    for part in latent.parts(weight):
        assert part.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


def test_recognised_in_other_orders(calls: list[Call]) -> None:
    """Rotary key before the rest, or cached before the latent: the absorbed form follows."""
    module, cached, q, k, v, scale = calls[0]
    rotary_dim = cached[1].shape[-1]

    def turned(x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x[..., -rotary_dim:], x[..., :-rotary_dim]), dim=-1)

    latent = find_latent(module, cached[::-1], turned(q), turned(k), v)
    assert latent is not None
    assert (latent.rotary_first, latent.latent_first) == (True, False)
    with latent_parts(module, [latent]):
        query, row = absorbed(module, latent, cached[::-1], turned(q))
        torch.testing.assert_close(query @ row.mT * scale, q @ k.mT * scale, rtol=0, atol=1e-10)


@pytest.mark.parametrize("broken", ["values", "keys", "rotary", "heads", "nothing cached", "weight"])
def test_anything_else_is_not_recognised(calls: list[Call], broken: str) -> None:
    """One number that the pair does not explain is enough."""
    module, cached, q, k, v, _ = calls[0]
    k, v, module, pair = k.clone(), v.clone(), copy.deepcopy(module), cached
    if broken == "values":
        v[1, 2, 3, 4] += 1e-3
    elif broken == "keys":
        k[0, 1, 2, 3] += 1e-3
    elif broken == "rotary":
        k[0, 1, 2, -1] += 1e-9
    elif broken == "heads":
        q = q[:, :3]
    elif broken == "nothing cached":
        pair = None
    else:  # an adapter that adds to what the matrix makes
        with torch.no_grad():
            module.kv_b_proj.weight[7] += 1e-3
    assert find_latent(module, pair, q, k, v) is None


def test_rows_that_are_no_smaller() -> None:
    """Two small heads with a wide latent: keys and values are less to keep."""
    module = torch.nn.Module()
    module.up = torch.nn.Linear(40, 24, bias=False).double()
    latent, rotary = torch.randn(1, 1, 4, 40).double(), torch.randn(1, 1, 4, 2).double()
    made = module.up(latent).view(1, 4, 2, 12).transpose(1, 2)
    k, v = torch.cat((made[..., :6], rotary.expand(1, 2, 4, 2)), dim=-1), made[..., 6:]
    found = find_latent(module, (latent, rotary), k, k, v)
    assert found is not None
    assert not found.is_worth_it


def test_sizes() -> None:
    """DeepSeek-V3: 576 numbers a token in place of 40,960."""
    latent = Latent("kv_b_proj.weight", num_heads=128, rest_dim=128, value_dim=128, latent_dim=512, rotary_dim=64)
    assert latent.row_dim == 576
    assert latent.is_worth_it
    assert latent.num_heads * (latent.rest_dim + latent.rotary_dim + latent.value_dim) == 40960
