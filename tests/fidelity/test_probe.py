"""What the probe must see: models with a fault built in by hand are refused, and rows that hide nothing are not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sinkexport.families.masks import lengthen_tables, visible_window
from sinkexport.families.probe import probe_attention
from sinkexport.model.fold_rotation import fold_rotation, functional
from sinkexport.reference.streaming import streaming_reference
from sinkrt import Session
from sinkrt.errors import UsageError
from transformers import masking_utils

from tests.exporter.tiny_models import COMMON, VOCAB_SIZE, tiny_model
from tests.support import export_model, random_ids, refused

C = 16

SMALL: dict[str, Any] = {**COMMON, "head_dim": 8}


def random_model(config: Any) -> Any:
    """A model with weights large enough for attention to matter, norms that are not all ones included."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not any(part in name for part in ("A_log", "dt_bias")):
                parameter.normal_(0, 0.25) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def probed(model: Any) -> tuple[Any, Any]:
    return probe_attention(model, model.config.num_hidden_layers, C)


def same_layout(name: str, model: Any) -> None:
    assert probed(model)[1].calls == probed(tiny_model(name))[1].calls
    assert all(spec.rotary_dim for spec in probed(model)[1].calls)


# Rows and weights that are zero or tiny.


@pytest.mark.parametrize("name", ["llama", "cohere", "glm", "gpt_neox"])
@pytest.mark.parametrize("factor", [0.0, 1e-9, 1e-30])
def test_rows_of_the_embedding_do_not_matter(name: str, factor: float) -> None:
    model = tiny_model(name)
    with torch.no_grad():
        model.get_input_embeddings().weight[:10] *= factor
    same_layout(name, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_model_whose_embeddings_are_all_tiny(dtype: torch.dtype) -> None:
    model = tiny_model("cohere", dtype=dtype)
    with torch.no_grad():
        model.get_input_embeddings().weight *= 1e-6
    same_layout("cohere", model)


@pytest.mark.parametrize("name", ["llama-mha"])
def test_a_padding_row_of_zeros_exports_exactly(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    with torch.no_grad():
        model.get_input_embeddings().weight[1] = 0
    export_model(model, tmp_path / "bundle", num_sink_tokens=4, window_size=12)
    ids = random_ids(1, C)
    with torch.no_grad():
        want = model(torch.from_numpy(ids)).logits.numpy()
    with Session.load(tmp_path / "bundle", threads=1) as session:
        for t in range(C):
            np.testing.assert_allclose(session.step(ids[:, t]), want[:, t], rtol=0, atol=1e-3)


@pytest.mark.parametrize("projection", ["q_proj", "k_proj"])
@pytest.mark.parametrize("factor", [1e-9, 1e-20])
def test_tiny_heads_and_dimensions_keep_their_layout(projection: str, factor: float) -> None:
    for name in ("llama", "cohere"):
        model = tiny_model(name)
        with torch.no_grad():
            weight = getattr(model.model.layers[0].self_attn, projection).weight
            weight[:8] *= factor  # a head
            weight[9::3] *= factor
        same_layout(name, model)


@pytest.mark.parametrize("projection", ["q_proj", "k_proj"])
def test_a_projection_of_zeros_is_refused(projection: str) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        getattr(model.model.layers[1].self_attn, projection).weight.zero_()
    with pytest.raises(UsageError, match="all zero in layer 1"):
        probed(model)
    with pytest.raises(UsageError, match="all zero in layer 1"), streaming_reference(model, 4, 12):
        pass


def test_a_pair_that_turns_otherwise_is_refused() -> None:
    """However small the pair is beside the others."""
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        attention.q_proj.weight[3] *= 1e-7
        attention.q_proj.weight[3 + 8] *= 1e-7
    changed_arguments(attention, q=lambda q: swapped(q, 3, 11))
    with pytest.raises(UsageError, match="queries that are more than a rotation"):
        probed(model)


def swapped(x: torch.Tensor, i: int, j: int) -> torch.Tensor:
    """Only after a rotation does it matter which of a pair is which: here turned one way more."""
    order = list(range(x.shape[-1]))
    order[i], order[j] = j, i
    is_turned = bool((x[:, :, 1:] - x[:, :, :1]).abs().max() > 0)
    return x[..., order] * (1 + 1e-3 * is_turned * torch.arange(x.shape[2])[:, None]) if is_turned else x


def changed_arguments(attention: Any, **changes: Any) -> None:
    """Let an attention module hand other queries, keys or values to its attention function."""
    forward, source = attention.forward, sys.modules[type(attention).__module__]
    functions = source.ALL_ATTENTION_FUNCTIONS

    class Changing:
        def get_interface(self, name: str, default: Any) -> Any:
            inner = functions.get_interface(name, default)

            def call(module: Any, q: Any, k: Any, v: Any, *others: Any, **named: Any) -> Any:
                given = {"q": q, "k": k, "v": v}
                q, k, v = (changes[key](x) if key in changes else x for key, x in given.items())
                return inner(module, q, k, v, *others, **named)

            return call

    def run(*arguments: Any, **named: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(source, "ALL_ATTENTION_FUNCTIONS", Changing())
            return forward(*arguments, **named)

    attention.forward = run


# Keys, as queries are.


def norm_after_rotation(model: Any, which: str) -> Any:
    weight = 1 + 0.3 * torch.randn(16, generator=torch.Generator().manual_seed(1))

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight

    changed_arguments(model.model.layers[1].self_attn, **{which: norm})
    return model


@pytest.mark.parametrize(("which", "named"), [("q", "queries"), ("k", "keys")])
def test_a_norm_after_the_rotation_is_refused(which: str, named: str) -> None:
    model = norm_after_rotation(tiny_model("llama"), which)
    with pytest.raises(UsageError, match=f"{named} that are more than a rotation .* in layer 1"):
        probed(model)
    with pytest.raises(UsageError, match="more than a rotation"), streaming_reference(model, 4, 12):
        pass


def test_hunyuan_with_its_key_norm_alone_has_weights_after_its_rotation() -> None:
    model = random_model(transformers.HunYuanDenseV1Config(**SMALL))
    for layer in model.model.layers:
        torch.nn.init.ones_(layer.self_attn.query_layernorm.weight)
    for layer, spec in enumerate(probed(model)[1].calls):
        module = f"model.layers.{layer}.self_attn"
        assert spec.norms == (f"{module}.query_layernorm", f"{module}.key_layernorm")
    with pytest.raises(UsageError, match="a key that is more than a rotation"), streaming_reference(model, 4, 12):
        pass


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"k": lambda k: k * torch.linspace(0.9, 1.1, k.shape[2])[:, None]},
            "the exported graph differs from the model|a state beside attention",
        ),
        ({"v": lambda v: v.cumsum(dim=2)}, "a state beside attention: earlier tokens change values of layer 0"),
        ({"q": lambda q: q.cumsum(dim=2)}, "queries that are more than a rotation"),
        ({"k": lambda k: k.roll(1, dims=2)}, "a rotation|a state beside attention"),
    ],
)
def test_what_depends_on_other_tokens_or_places_is_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    changed_arguments(model.model.layers[0].self_attn, **change)
    with pytest.raises(UsageError, match=named):
        export_model(model, tmp_path / "out", num_sink_tokens=4, window_size=12, chunk_size=4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [2, 40])
def test_copies_of_key_heads_with_an_exception_are_all_cached(place: int) -> None:
    """JetMoE hands on three key heads, once for each of two experts. The probe runs fewer tokens than 40."""
    model = tiny_model("jetmoe")
    assert [(call.num_kv_heads, call.is_tiled) for call in probed(model)[0].calls] == [(3, True)] * 2

    def changed(k: torch.Tensor) -> torch.Tensor:
        k = k.clone()
        k[:, 4, place : place + 1] *= 2.0
        return k

    changed_arguments(model.model.layers[1].self_attention, k=changed)
    assert [(call.num_kv_heads, call.is_tiled) for call in probed(model)[0].calls] == [(3, True), (6, False)]


def test_values_that_turn_are_refused() -> None:
    model = tiny_model("llama")
    attention, rotary = model.model.layers[0].self_attn, transformers.models.llama.modeling_llama.apply_rotary_pos_emb
    forward, kept = attention.forward, []

    def run(*arguments: Any, **named: Any) -> Any:
        kept[:] = [named["position_embeddings"]]
        return forward(*arguments, **named)

    changed_arguments(attention, v=lambda v: rotary(v, v, *kept[0])[0])
    inner = attention.forward
    forward = inner
    attention.forward = run
    with pytest.raises(UsageError, match="values that turn in layer 0"):
        probed(model)


# Calls of attention.


def test_two_calls_in_a_layer_have_a_place_each() -> None:
    config = transformers.DiffLlamaConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"})
    calls = probed(random_model(config))[0].calls
    assert [(call.layer, call.number) for call in calls] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_values_of_another_size_than_keys() -> None:
    model = tiny_model("llama")
    changed_arguments(model.model.layers[0].self_attn, v=lambda v: torch.cat((v, v[..., :8]), dim=-1))
    attention = model.model.layers[0].self_attn
    attention.o_proj = torch.nn.Linear(attention.o_proj.in_features * 3 // 2, attention.o_proj.out_features)
    shape = probed(model)[0]
    assert [(call.key_dim, call.value_dim) for call in shape.calls] == [(16, 24), (16, 16)]
    assert not shape.is_uniform


def test_fewer_value_than_key_heads() -> None:
    model = tiny_model("llama")
    changed_arguments(model.model.layers[0].self_attn, v=lambda v: v[:, :1])
    assert [call.num_kv_heads for call in probed(model)[0].calls] == [2, 2]


def test_heads_that_do_not_match_are_refused() -> None:
    model = tiny_model("llama")
    changed_arguments(model.model.layers[0].self_attn, v=lambda v: torch.cat((v, v[:, :1]), dim=1))
    with pytest.raises(UsageError, match=r"queries, keys and values of shapes .* in layer 0"):
        probed(model)


# States beside attention.


def test_falcon_h1_has_mamba_states_beside_attention() -> None:
    sizes = {"mamba_d_ssm": 48, "mamba_n_heads": 6, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
    config = transformers.FalconH1Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}, **sizes)
    shape = probed(random_model(config))[0]
    assert [call.layer for call in shape.calls] == [0, 1]
    states = {("conv", 0): (64, 4), ("recurrent", 0): (6, 8, 8)}
    for layer in (0, 1):
        assert {key: state.shape for key, state in shape.recurrent[layer].items()} == states


def test_zaya_has_convolutions_before_attention() -> None:
    config = transformers.ZayaConfig(
        **{k: v for k, v in SMALL.items() if k != "intermediate_size"},
        num_experts=4,
        moe_intermediate_size=32,
        router_hidden_size=16,
    )
    recurrent = probed(random_model(config))[0].recurrent
    assert {key for states in recurrent.values() for key in states} == {("conv", 0), ("recurrent", 0)}


class Remembers(torch.nn.Module):
    """An MLP that adds something of the tokens before, in the same call or in an earlier one."""

    def __init__(self, inner: torch.nn.Module, across_calls: bool) -> None:
        super().__init__()
        self.inner, self.across_calls, self.last = inner, across_calls, torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.across_calls:
            last, self.last = self.last, x.detach().mean()
            return self.inner(x) + 0.1 * last
        return self.inner(x) + 0.1 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_a_state_beside_attention_is_refused(name: str) -> None:
    model = tiny_model(name)
    model.model.layers[1].mlp = Remembers(model.model.layers[1].mlp, across_calls=name == "qwen3_next")
    with pytest.raises(UsageError, match=r"beside attention|outside (attention|the rotary)"):
        probed(model)


def test_the_reference_refuses_a_state_beside_attention_too() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = Remembers(model.model.layers[1].mlp, across_calls=False)
    with pytest.raises(UsageError, match="6 tokens whose logits, streamed"), streaming_reference(model, 4, 12):
        pass


# Masks.


def test_a_window_that_only_the_mask_has_is_refused() -> None:
    model = tiny_model("mistral", sliding_window=9)
    assert [call.sliding_window for call in probed(model)[0].calls] == [9, 9]
    for layer in model.model.layers:
        layer.self_attn.config = model.config
    source = transformers.models.mistral.modeling_mistral
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "create_sliding_window_causal_mask", masking_utils.create_causal_mask)
        with pytest.raises(UsageError, match="a mask of all tokens in layer 0, which passes a window of 9"):
            probed(model)


@pytest.mark.parametrize(
    ("function", "window"),
    [
        (masking_utils.causal_mask_function, None),
        (masking_utils.sliding_window_causal_mask_function(5), 5),
        (masking_utils.sliding_window_causal_mask_function(40), None),
        (masking_utils.bidirectional_mask_function, "no window"),
        (masking_utils.sliding_window_bidirectional_mask_function(5), "no window"),
        (
            masking_utils.chunked_causal_mask_function(7, torch.zeros(1, dtype=torch.int64)),
            "16 cached tokens, and chunks of 7",
        ),
        (masking_utils.chunked_causal_mask_function(15, torch.zeros(1, dtype=torch.int64)), "and chunks of 15"),
        (masking_utils.chunked_causal_mask_function(16, torch.zeros(1, dtype=torch.int64)), None),
        (masking_utils.chunked_causal_mask_function(24, torch.zeros(1, dtype=torch.int64)), None),
        (masking_utils.chunked_causal_mask_function(99, torch.zeros(1, dtype=torch.int64)), None),
        (lambda _b, _h, q, k: (k <= q) & (k > q // 2), "no(t of one size| window)"),
        (masking_utils.and_masks(masking_utils.causal_mask_function, lambda _b, _h, _q, k: k % 2 == 0), "no window"),
    ],
)
def test_what_a_mask_lets_a_token_see(function: Any, window: Any) -> None:
    if isinstance(window, str):
        with pytest.raises(UsageError, match=window):
            visible_window(function, C, 0)
    else:
        assert visible_window(function, C, 0) == window


def of_images(*images: int) -> Any:
    """A mask under which the tokens of an image see each other. images: the image of each token, -1: none."""
    blocks = masking_utils.blockwise_overlay(torch.tensor([images]))
    return masking_utils.or_masks(masking_utils.sliding_window_causal_mask_function(5), blocks)


def test_a_mask_that_says_the_same_of_all_tokens_is_known_beyond_them() -> None:
    function = of_images(-1, -1, -1, -1)
    with pytest.raises(UsageError, match="a mask in layer 3 that differs from token to token"):
        visible_window(function, C, 3)
    lengthen_tables(function, 2 * C + 2)
    assert visible_window(function, C, 3) == 5


def test_a_mask_that_knows_the_tokens_apart_is_refused() -> None:
    function = of_images(-1, 0, 0, -1)
    lengthen_tables(function, 2 * C + 2)
    with pytest.raises(UsageError, match=r"a mask in layer 3 that (differs from token to token|is no window)"):
        visible_window(function, C, 3)


# In-place operators.


class WritesInPlace(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y[..., 0].add_(1.0)  # has no user
        y[:, 1:] *= 3
        return y + x


def test_in_place_operators_survive_folding() -> None:
    model, x = WritesInPlace(), torch.randn(2, 4)
    program = torch.export.export(model, (x,), strict=False)
    with pytest.raises(UsageError, match="writes into"):
        fold_rotation(program)
    program = functional(program)
    fold_rotation(program)
    torch.testing.assert_close(program.module()(x), model(x))


def test_a_model_that_writes_into_a_buffer_is_refused() -> None:
    class Counts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x + self.calls

    with pytest.raises(UsageError, match="writes into 'calls'"):
        functional(torch.export.export(Counts(), (torch.ones(2),), strict=False))


def test_gemma_3n_is_exact(tmp_path: Path) -> None:
    """Its predictions are written in place into a stack of hidden states."""
    config = transformers.Gemma3nTextConfig(
        **SMALL,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB_SIZE,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0, 0.0],
        num_kv_shared_layers=0,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    model = random_model(config)
    manifest = export_model(model, tmp_path / "out", num_sink_tokens=4, window_size=12).manifest
    assert manifest.model.family == "gemma3n_text"


# Errors.


class Raises(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise TypeError("unsupported")


class Chooses(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.sum()) > 0 else x


@pytest.mark.parametrize(
    ("mlp", "step"), [(Raises, "probing its attention (unsupported)"), (Chooses, "tracing the decode graph")]
)
def test_failures_of_a_models_code_name_family_and_step(mlp: type[torch.nn.Module], step: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = mlp()
    with refused("model family 'llama'", step, error=UsageError):
        export_model(model, tmp_path / "out", num_sink_tokens=4, window_size=9, chunk_size=4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_is_no_fault_of_the_model_passes_through(error: type[BaseException]) -> None:
    model = tiny_model("llama")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    model.model.layers[0].mlp.forward = fail
    with pytest.raises(error):
        probed(model)
