"""The call-following reference: like the re-rotating one where both apply, and like an oracle for other families."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sinkexport.families.interface import intercept_attention
from sinkexport.reference.calls import calls_reference
from sinkexport.reference.streamed import CALL_FOLLOWING, RE_ROTATING, streamed_logits
from sinkexport.reference.streaming import streaming_reference
from sinkexport.variants.variant import PLAIN, AttentionVariant
from sinkrt.contract import ActTuning, SinkTuning
from sinkrt.errors import UsageError

from tests.exporter.tiny_models import RE_ROTATED, TINY, VOCAB_SIZE, tiny_model

B = 2
ROUNDING = 1e-5
"""Share of the logits' spread."""

# Their states are summed in another order over a text than over single tokens, in float32.
RECURRENT = (
    *("qwen3_next", "qwen3_5_text", "olmo_hybrid"),
    *("lfm2", "lfm2_moe", "granitemoehybrid", "bamba", "falcon_h1", "jamba"),
)
AGREEING = [name for name in RE_ROTATED if name not in RECURRENT]


def in_float64(model: Any) -> Any:
    """In float64, in which both references round alike; grouped matmuls of experts have no such type."""
    model.set_experts_implementation("eager")
    return model.double()


def random_ids(num_tokens: int) -> torch.Tensor:
    """int64 [B, num_tokens]."""
    return torch.randint(3, VOCAB_SIZE, (B, num_tokens), generator=torch.Generator().manual_seed(0))


def followed(model: Any, ids: torch.Tensor, geometry: tuple[int, int], variant: Any = PLAIN) -> torch.Tensor:
    with calls_reference(model, *geometry, variant) as reference:
        return torch.stack(list(reference.logits(ids)), dim=1)


def rotated(model: Any, ids: torch.Tensor, geometry: tuple[int, int], variant: Any = PLAIN) -> torch.Tensor:
    with streaming_reference(model, *geometry, variant=variant) as reference:
        return torch.stack([reference.step(column) for column in ids.T], dim=1)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest, as a share of the spread of each position's logits."""
    return float(((got - wanted).abs() / wanted.std(dim=-1, keepdim=True)).max())


@pytest.mark.parametrize(
    ("name", "geometry"), [*((name, (3, 6)) for name in AGREEING), *((name, (0, 5)) for name in AGREEING[::3])], ids=str
)
def test_both_references_agree(name: str, geometry: tuple[int, int]) -> None:
    model = in_float64(tiny_model(name))
    ids = random_ids(sum(geometry) + 6 * geometry[1] + 2)
    assert error(followed(model, ids, geometry), rotated(model, ids, geometry)) < ROUNDING


@pytest.mark.parametrize("name", RECURRENT)
def test_states_beside_attention_are_carried_over_all_tokens(name: str) -> None:
    model = in_float64(tiny_model(name))
    ids = random_ids(9 + 36)
    assert error(followed(model, ids, (3, 6)), rotated(model, ids, (3, 6))) < 1e-3


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # Windows of the model's own between W and S + W, and as large as either.
        *(("mistral", {"sliding_window": window}) for window in (6, 7, 8, 9)),
        (
            "phi3-partial",
            {
                "original_max_position_embeddings": 4,
                "rope_parameters": {
                    **TINY["phi3-partial"][1]["rope_parameters"],
                    "original_max_position_embeddings": 4,
                },
            },
        ),
    ],
    ids=str,
)
def test_both_agree_on_windows_and_on_rotation_by_length(name: str, changes: dict[str, Any]) -> None:
    model = in_float64(tiny_model(name, **changes))
    for num_tokens in (7, 40):
        ids = random_ids(num_tokens)
        assert error(followed(model, ids, (3, 6)), rotated(model, ids, (3, 6))) < ROUNDING


def test_both_agree_on_per_head_windows_and_factors_on_token_0() -> None:
    model = in_float64(tiny_model("llama"))
    factors = tuple(tuple(0.25 * (layer + head + 1) for head in range(6)) for layer in range(2))
    variant = AttentionVariant(
        sink_tuning=SinkTuning(sha256="0" * 64, first_token_scale=factors, act=None),
        head_windows=((6, 3), (2, 6)),
    )
    ids = random_ids(40)
    got = followed(model, ids, (3, 6), variant)
    assert error(got, rotated(model, ids, (3, 6), variant)) < ROUNDING
    assert error(got, followed(model, ids, (3, 6))) > 1e-2


# --- families that the re-rotating reference does not follow --------------------------------------------------------

FOLLOWED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {},
    "deepseek_v2": {},
    "llama4_text": {"attention_chunk_size": 64},
    "ministral3": {
        "rope_parameters": {**TINY["ministral3"][1]["rope_parameters"], "original_max_position_embeddings": 2}
    },
    "diffllama": {},
    "gemma3n_text": {"sliding_window": 4},
    "nanochat": {"num_key_value_heads": 6},
    "hunyuan_v1_dense": {},
    "jamba": {"use_mamba_kernels": False},
    "lfm2": {},
}
"""Models of `TINY`, and what is changed of their configurations."""

STATES = (
    "recurrent_gemma",
    "minimax",
    "zaya",
    "lfm3",
    "nemotron_h",
    "zamba2",
    "kimi_linear",
    "bailing_hybrid",
    "mamba",
)
"""Models of `TINY` with states beside attention, which must run over all tokens."""


def followed_model(name: str, **changes: Any) -> Any:
    return tiny_model(name, **{**FOLLOWED.get(name, {}), **changes})


class Oracle:
    """One pass of the whole model for each token t, over tokens 0 .. t at their in-cache positions as seen from t.

    Attention is answered for token t alone. The others get what they got when they were the newest.
    """

    def __init__(self, model: Any, num_sinks: int, window: int) -> None:
        self.model, self.num_sinks, self.window = model, num_sinks, window
        self.capacity = num_sinks + window
        self.outputs: list[list[torch.Tensor]] = []  # [B, Hq, Dv], by call and token
        self.time = self.call = 0

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        found = []
        for self.time in range(ids.shape[1]):
            self.call = 0
            newest = min(self.time, self.capacity - 1)
            # An evicted token stands anywhere but at place 0, where recurrences begin anew.
            places = [newest - self.time + token for token in range(self.time + 1)]
            places = [place if place >= min(self.num_sinks, 1) else 1 for place in places]
            places[: self.num_sinks] = range(min(self.num_sinks, len(places)))
            given = ids[:, : self.time + 1]
            with torch.no_grad():
                logits = self.model(
                    input_ids=given,
                    position_ids=torch.tensor([places]).expand(B, -1),
                    attention_mask=torch.ones_like(given),  # or they would be taken for several texts
                    use_cache=False,
                ).logits
            found.append(logits[:, -1])
        return torch.stack(found, dim=1)

    def attend(
        self,
        module: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *_: Any,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **__: Any,
    ) -> tuple[torch.Tensor, None]:
        """[B, T, Hq, Dv]."""
        num_sinks, window = self.num_sinks, self.window
        if sliding_window is not None and sliding_window < self.capacity:
            num_sinks, window = 0, sliding_window
        tokens = [u for u in range(self.time + 1) if u < num_sinks or u > self.time - window]
        group = q.shape[1] // k.shape[1]
        scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
        scaling *= self.temperature(module)
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        for b in range(q.shape[0]):
            for head in range(q.shape[1]):
                logits = torch.stack([q[b, head, -1] @ k[b, head // group, u] for u in tokens]) * scaling
                weights = logits.softmax(dim=0)
                out[b, head] = sum(w * v[b, head // group, u] for w, u in zip(weights, tokens, strict=True))
        if self.call == len(self.outputs):
            self.outputs.append([])
        self.outputs[self.call].append(out)
        self.call += 1
        return torch.stack(self.outputs[self.call - 1], dim=1), None

    def temperature(self, module: Any) -> float:
        """Llama 4 counts tokens: the factor of the place in the cache for that of the place in the text."""
        if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
            return 1.0
        place, wanted = (
            1 + module.attn_scale * math.log1p((position + 1) // module.floor_scale)
            for position in (self.time, min(self.time, self.capacity - 1))
        )
        return wanted / place


@pytest.mark.parametrize(
    ("name", "geometry"),
    [*((name, g) for name in FOLLOWED for g in ((2, 4), (0, 5))), *((name, (2, 4)) for name in STATES)],
    ids=str,
)
def test_families_follow_the_oracle(name: str, geometry: tuple[int, int]) -> None:
    model = in_float64(followed_model(name))
    ids = random_ids(sum(geometry) + 6 * geometry[1] + 1)
    oracle = Oracle(model, *geometry)
    with intercept_attention(model, oracle.attend):
        wanted = oracle.logits(ids)
    got = followed(model, ids, geometry)
    assert error(got, wanted) < ROUNDING
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits
    capacity = sum(geometry)
    assert error(got[:, :capacity], dense[:, :capacity]) < ROUNDING
    # From the first eviction on it is another thing, unless there is no attention.
    assert (error(got[:, capacity:], dense[:, capacity:]) > 1e-2) == (name != "mamba")


@pytest.mark.parametrize("name", [name for name in TINY if name not in RE_ROTATED])
def test_all_other_families_are_dense_before_the_window_fills(name: str) -> None:
    model = tiny_model(name)
    ids = random_ids(12)
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits
    got = followed(model, ids, (3, 6))
    assert error(got[:, :9], dense[:, :9]) < 1e-3
    assert bool(got.isfinite().all())


def test_an_indexer_that_keeps_all_cached_tokens_is_dense_attention() -> None:
    ids = random_ids(9 + 36)

    def model(topk: int) -> Any:
        return in_float64(tiny_model("deepseek_v32", index_topk=topk))

    got = followed(model(9), ids, (3, 6))
    assert error(got, followed(model(2048), ids, (3, 6))) < ROUNDING
    with pytest.raises(UsageError, match="no window of the newest tokens"):
        followed(model(8), ids, (3, 6))


# --- what it refuses, and how it leaves a model -----------------------------------------------------------------------


def test_chunks_smaller_than_the_cache_are_refused() -> None:
    ids = random_ids(20)
    followed(followed_model("llama4_text", attention_chunk_size=9), ids, (3, 6))
    with pytest.raises(UsageError, match="no window of the newest tokens"):
        followed(followed_model("llama4_text", attention_chunk_size=8), ids, (3, 6))


def test_unknown_arguments_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(UsageError, match="position_bias"), calls_reference(model, 3, 6) as reference:
        q = torch.zeros(1, 2, 3, 4)
        reference.attend(model.model.layers[0].self_attn, q, q, q, None, position_bias=q)


def test_changes_after_the_softmax_are_refused() -> None:
    heads = ((True,) * 6,) * 2
    act = ActTuning(heads=heads, alpha=5.0, beta=0.4, min_queries=4)
    tuning = SinkTuning(sha256="0" * 64, first_token_scale=((1.0,) * 6,) * 2, act=act)
    variant = AttentionVariant(sink_tuning=tuning)
    with pytest.raises(UsageError, match="after the softmax"), calls_reference(tiny_model("llama"), 3, 6, variant):
        pass


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama")
    model.model.layers[1].train()
    ids = random_ids(12)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    implementation = model.config._attn_implementation
    followed(model, ids, (3, 6))
    with pytest.raises(RuntimeError, match="stop"), calls_reference(model, 3, 6) as reference:
        next(reference.logits(ids))
        raise RuntimeError("stop")
    assert model.config._attn_implementation == implementation
    assert [layer.training for layer in model.model.layers] == [False, True]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, wanted)


# --- which reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "reference"),
    [
        (lambda: tiny_model("llama"), RE_ROTATING),
        (lambda: followed_model("deepseek_v3"), CALL_FOLLOWING),
        (lambda: followed_model("deepseek_v2"), CALL_FOLLOWING),
        (lambda: followed_model("llama4_text"), CALL_FOLLOWING),
        (lambda: followed_model("ministral3"), CALL_FOLLOWING),
        (lambda: followed_model("diffllama"), CALL_FOLLOWING),
    ],
    ids=["llama", "deepseek_v3", "deepseek_v2", "llama4", "ministral3", "diffllama"],
)
def test_the_reference_that_can_follow_is_taken(model: Any, reference: str) -> None:
    ids = random_ids(20)
    with streamed_logits(model(), ids, 3, 6) as streamed:
        assert (streamed.reference, streamed.num_tokens) == (reference, 20)
        assert len(list(streamed.logits)) == 20


def test_work_is_limited() -> None:
    model, ids = followed_model("diffllama"), random_ids(40)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    a_token = num_parameters * B * 2 * 9  # a text of the cache, with sinks and without
    for work, num_tokens in ((0.0, 9), (4.5 * a_token, 13), (1e99, 40)):
        with streamed_logits(model, ids, 3, 6, max_work=work) as streamed:
            assert streamed.num_tokens == num_tokens
            assert len(list(streamed.logits)) == num_tokens
