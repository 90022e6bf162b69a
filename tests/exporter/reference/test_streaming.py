"""The streaming reference: dense before the window fills, the oracle after, and the model untouched at the end."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sinkexport.families.recurrent import layers_without_attention
from sinkexport.reference.streaming import streaming_reference
from sinkrt.errors import UsageError
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.exporter.tiny_models import RE_ROTATED, VOCAB_SIZE, random_model, tiny_model
from tests.reference.oracle import SinkAttentionOracle

S, W = 3, 6
C = S + W
B = 2
INTERLEAVED = ("cohere", "cohere2", "glm", "gptj", "codegen")


def random_ids(steps: int, seed: int = 0) -> torch.Tensor:
    """int64 [B, steps], each stream with ids of its own."""
    return torch.randint(3, VOCAB_SIZE, (B, steps), generator=torch.Generator().manual_seed(seed))


def dense(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits
    return logits


def streamed(model: Any, ids: torch.Tensor, num_sink_tokens: int = S, window_size: int = W) -> torch.Tensor:
    with streaming_reference(model, num_sink_tokens, window_size) as reference:
        return torch.stack([reference.step(ids[:, t]) for t in range(ids.shape[1])], dim=1)


@pytest.mark.parametrize("name", RE_ROTATED)
def test_dense_before_the_window_fills(name: str) -> None:
    model = tiny_model(name)
    ids = random_ids(C + 3)
    want, got = dense(model, ids), streamed(model, ids)
    scale = float(want.std())
    # transformers sums linear attention in another order over a text than over single tokens.
    tolerance = 5e-4 if layers_without_attention(model) else 2e-5
    assert float((got - want)[:, :C].abs().max()) < tolerance * scale
    assert float((got - want)[:, C:].abs().max()) > 1e-2 * scale  # from the first eviction on it is another thing


@pytest.mark.parametrize(
    ("name", "geometry"),
    [
        *((name, (S, W)) for name in RE_ROTATED),
        *((name, g) for name in ("llama", "smollm3", "gemma3_text", "gpt_oss", "bloom") for g in ((0, 5), (4, 1))),
    ],
    ids=str,
)
def test_every_attention_equals_the_oracle(name: str, geometry: tuple[int, int]) -> None:
    model = tiny_model(name)
    names = ("rotary_emb", "pos_emb")
    rotary = next((r for name in names if (r := getattr(model.base_model, name, None))), None)
    rotary = table_of_sinusoids(model) or rotary
    oracles: dict[Any, SinkAttentionOracle] = {}
    worst = 0.0

    def observe(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
        nonlocal worst
        if module not in oracles:
            oracles[module] = oracle_of(name, model, module, rotary, geometry)
        want = oracles[module].step(*(x[:, :, 0].double().numpy() for x in (q, k, v)))  # [B, Hq, D]
        worst = max(worst, float(np.abs(out[:, 0].double().numpy() - want).max()) / max(1.0, float(np.abs(want).max())))

    ids = random_ids(3 * sum(geometry) + 7)
    with streaming_reference(model, *geometry, observer=observe) as reference:
        for t in range(ids.shape[1]):
            reference.step(ids[:, t])
    assert len(oracles) == model.config.num_hidden_layers - len(layers_without_attention(model))
    assert worst < 1e-5


def oracle_of(name: str, model: Any, module: Any, rotary: Any, geometry: tuple[int, int]) -> SinkAttentionOracle:
    """What the configuration and transformers' own modules say of one layer's attention."""
    num_sinks, window = geometry
    own_window = getattr(module, "sliding_window", None)
    if own_window is not None and own_window < sum(geometry):
        num_sinks, window = 0, own_window
    slopes, prefix = alibi_slopes(model), ""
    if hasattr(rotary, "layer_types"):
        prefix = model.config.layer_types[module.layer_idx] + "_"
    rotates = getattr(module, "use_rope", name != "cohere2" or own_window is not None)
    has_rotary = slopes is None and rotary is not None and rotates
    return SinkAttentionOracle(
        batch=B,
        num_sink_tokens=num_sinks,
        window_size=window,
        inv_freq=getattr(rotary, f"{prefix}inv_freq") if has_rotary else (),
        interleaved=name in INTERLEAVED,
        attention_scaling=getattr(rotary, f"{prefix}attention_scaling", 1.0) if has_rotary else 1.0,
        scale=next(
            (getattr(module, key) for key in ("scaling", "inv_norm_factor", "softmax_scale") if hasattr(module, key)),
            None,
        ),
        softcap=getattr(module, "attn_logit_softcapping", None) or 0.0,
        alibi_slopes=slopes,
        sink_logit=module.sinks.detach() if hasattr(module, "sinks") else None,
    )


def table_of_sinusoids(model: Any) -> Any:
    """GPT-J's and CodeGen's frequencies, from the angles of place 1 in the tables that transformers makes."""
    attention = getattr(model.base_model.h[0], "attn", None) if hasattr(model.base_model, "h") else None
    table = getattr(model.base_model, "rotary_emb", attention)  # the model's own since transformers 5.24
    if not hasattr(table, "embed_positions"):
        return None
    sin, cos = table.embed_positions[1].double().chunk(2)
    return types.SimpleNamespace(inv_freq=torch.atan2(sin, cos), attention_scaling=1.0)


def alibi_slopes(model: Any) -> np.ndarray | None:
    """What the biases that transformers itself builds grow by from place to place, [Hq]."""
    config, ones = model.config, torch.ones(1, 2, dtype=torch.int64)
    if config.model_type == "bloom":
        biases = model.transformer.build_alibi_tensor(ones, config.n_head, torch.float32)
    elif config.model_type == "mpt":
        biases = model.transformer.build_mpt_alibi_tensor(config.n_heads, 2)
    elif config.model_type == "falcon" and config.alibi:
        build = transformers.models.falcon.modeling_falcon.build_alibi_tensor
        biases = build(ones, config.num_attention_heads, torch.float32) * config.head_dim**-0.5
    else:
        return None
    slopes: np.ndarray = (biases[:, 0, 1] - biases[:, 0, 0]).numpy()
    return slopes


def test_layers_without_positions_are_distinguished() -> None:
    model = tiny_model("smollm3")
    assert {layer.self_attn.use_rope for layer in model.model.layers} == {True, False}
    with streaming_reference(model, S, W) as reference:
        modules = [layer.self_attn for layer in model.model.layers]
        rotates = {module.layer_idx: reference.rotation.rotates(module) for module in modules}
    assert rotates == {i: bool(layer.self_attn.use_rope) for i, layer in enumerate(model.model.layers)}


def test_float64_model() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    ids = random_ids(C)
    got = streamed(model, ids)
    assert got.dtype == torch.float64
    # transformers computes rotation and softmax in float32 whatever the model's dtype, in both runs alike.
    torch.testing.assert_close(got, dense(model, ids), rtol=0, atol=1e-5)


def test_streams_of_a_batch_are_independent() -> None:
    model = tiny_model("qwen3")
    ids = random_ids(3 * C)
    together = streamed(model, ids)
    for stream in range(B):
        torch.testing.assert_close(
            together[stream : stream + 1], streamed(model, ids[stream : stream + 1]), rtol=0, atol=2e-5
        )
    assert float((together[0] - together[1]).abs().max()) > 0.1


def test_reset_forgets() -> None:
    model = tiny_model("llama")
    ids = random_ids(2 * C)
    with streaming_reference(model, S, W) as reference:
        first = [reference.step(ids[:, t]) for t in range(2 * C)]
        assert not torch.equal(reference.step(ids[:, 0]), first[0])
        reference.reset()
        for t in range(2 * C):
            assert torch.equal(reference.step(ids[:, t]), first[t])


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_the_model_is_left_as_it_was(name: str, fails: bool) -> None:
    model = tiny_model(name)
    model.base_model.layers[1].train()  # mixed modes are to survive too
    ids = random_ids(C)
    want = dense(model, ids)
    before = (
        {key: id(module) for key, module in model.named_modules()},
        {key: module.training for key, module in model.named_modules()},
        list(model.base_model._modules),
        model.config._attn_implementation,
        sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()),
    )
    try:
        with streaming_reference(model, S, W) as reference:
            reference.step(ids[:, 0])
            assert not torch.allclose(dense(model, ids[:, 1:]), want[:, 1:])  # it really is changed inside
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    after = (
        {key: id(module) for key, module in model.named_modules()},
        {key: module.training for key, module in model.named_modules()},
        list(model.base_model._modules),
        model.config._attn_implementation,
        sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()),
    )
    assert before == after
    assert torch.equal(dense(model, ids), want)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        # Learned positions, a norm after the rotation.
        (
            lambda: random_model(transformers.GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4)),
            "a function of position",
        ),
        (lambda: tiny_model("hunyuan_v1_dense"), "more than a rotation"),
    ],
    ids=["gpt2", "hunyuan"],
)
def test_refused(made: Callable[[], Any], reason: str) -> None:
    model = made()
    want = dense(model, random_ids(4))
    with pytest.raises(UsageError, match=reason), streaming_reference(model, S, W):
        pass
    assert torch.equal(dense(model, random_ids(4)), want)


def test_a_layer_without_attention_is_refused() -> None:
    model = tiny_model("llama")

    class Mixer(torch.nn.Module):  # keeps a state of its own, as recurrent and convolution layers do
        def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
            return hidden_states.cumsum(dim=1), None

    model.model.layers[0].self_attn = Mixer()
    with pytest.raises(UsageError, match="1 attention layers of 2"), streaming_reference(model, S, W):
        pass


def test_a_smaller_window_of_the_models_own_is_kept() -> None:
    model = tiny_model("mistral", sliding_window=9)
    ids = random_ids(40)
    want = dense(model, ids)  # transformers masks what is outside of the window
    assert float((streamed(model, ids, 4, 6) - want).abs().max()) < 2e-5 * float(want.std())
    assert float((streamed(model, ids, 4, 5) - want).abs().max()) > 1e-2 * float(want.std())


@pytest.mark.parametrize("geometry", [(-1, 4), (4, 0)])
def test_bad_geometry(geometry: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="sinks and window"), streaming_reference(tiny_model("llama"), *geometry):
        pass
