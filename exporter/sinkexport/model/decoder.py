"""T tokens of a Hugging Face model over explicit state tensors, as a module that can be traced.

The model's own code runs unchanged; only two things are swapped for the length of a trace. Its rotary embedding hands
out cos = 1 and sin = 0, so that the model's rotation is the identity, which `fold_rotation` removes from the trace. Its
attention function rotates once with exact phase and calls the sink-attention operator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from sinkrt.contract import MASS_KIND, NO_TOKEN, SCALE_KINDS, STATE_KINDS

from sinkexport.config import ExportConfig, target_of
from sinkexport.families.interface import attention_inputs, intercept_attention
from sinkexport.families.latent import Latent
from sinkexport.families.recurrent import with_cache
from sinkexport.families.rope import ModelRotary
from sinkexport.families.shape import AttentionShape
from sinkexport.model.affine import AffineFactors
from sinkexport.model.experts import static_experts
from sinkexport.model.forward_pass import ForwardPass
from sinkexport.model.head_caches import HeadCache, cache_owner, head_caches
from sinkexport.model.int8_rows import SCALE_DTYPE
from sinkexport.model.layer_kinds import LayerRepeats
from sinkexport.model.loop_experts import unrolled_experts
from sinkexport.model.repeated_layers import LeftOut
from sinkexport.recurrent.states import StateKey, Tokens, state_name

Place = HeadCache | int
"""Owner of a state: a cache, or a layer with recurrent states."""

Kind = str | StateKey
"""A cache's kind of state, or the key of a recurrent one."""

VALUE_KINDS = ("sink_v", "window_v")
"""States that a latent cache has not."""


class StreamStep(torch.nn.Module):
    """``forward(ids, position, states, num_valid) -> (logits, next states)``: T tokens of each of B streams.

    ids: int64 [B, T]. position: int64 [B], of the first token. states: in the order of ``states``.
    num_valid: int64 [B], how many of the T tokens count; left out if T = 1. Then, in a model with recurrent states, an
    id below 0 is no token: its stream stands still.
    logits: float32 [B, vocab], after the last token that counts; with all_logits [B, T, vocab], after each.
    """

    def __init__(
        self,
        model: Any,
        config: ExportConfig,
        shape: AttentionShape,
        rotary: ModelRotary,
        *,
        batch: int,
        num_tokens: int,
        all_logits: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.shape = shape
        self.rotary = rotary
        self.batch = batch
        self.num_tokens = num_tokens
        self.all_logits = all_logits
        variant = config.variant
        self.caches = head_caches(config, variant, shape)
        owners = [cache_owner(config, shape, call) for call in range(len(shape.calls))]
        self.caches_of_call = [[cache for cache in self.caches if cache.call == owner] for owner in owners]
        for table, content in rotary.tables.items():
            self.register_buffer(f"frequency_{table}", content.frequency, persistent=False)
        for call, scales in rotary.query_scales.items():
            self.register_buffer(f"query_scale_{call}", scales.float(), persistent=False)
        slopes = None if shape.alibi_slopes is None else torch.tensor(shape.alibi_slopes)
        self.register_buffer("alibi_slopes", slopes, persistent=False)
        tuning = variant.sink_tuning
        for layer, factors in enumerate(() if tuning is None else tuning.first_token_scale):
            if set(factors) != {1.0}:  # a layer without any stays as it is, to the byte
                self.register_buffer(f"sink_scale_{layer}", torch.tensor(factors), persistent=False)
        dtype, heads = next(model.parameters()).dtype, shape.num_q_heads
        self.affine = torch.nn.ModuleDict(
            {
                str(layer): AffineFactors(tensors, heads, dtype)
                for layer, tensors in ({} if variant.affine is None else variant.affine.layers).items()
                if tensors.changed_heads(heads)
            }
        )
        self.act = variant.act
        for layer, chosen in enumerate(() if self.act is None else self.act.heads):
            if any(chosen):
                self.register_buffer(f"calibrated_{layer}", torch.tensor(chosen).float(), persistent=False)
        self.repeats: LayerRepeats | None = None
        """Layers that a trace leaves out, as others show what they do."""

    def state_kinds(self, cache: HeadCache) -> tuple[str, ...]:
        """State tensors of a cache, in the order in which `states` holds them."""
        kinds: tuple[str, ...] = STATE_KINDS if cache.ring.num_sink_tokens else STATE_KINDS[2:]
        kinds = (*kinds, *SCALE_KINDS) if self.config.has_int8_window else kinds
        kinds = tuple(kind for kind in kinds if kind not in VALUE_KINDS) if cache.is_latent else kinds
        is_calibrated = self.act is not None and any(self.act.heads[cache.layer][head] for head in cache.q_heads)
        return (*kinds, MASS_KIND) if is_calibrated else kinds

    @property
    def latents(self) -> list[Latent]:
        """What makes keys and values in the calls whose caches are latent."""
        calls = zip(self.shape.calls, self.caches_of_call, strict=True)
        return [call.latent for call, caches in calls if call.latent is not None and caches[0].is_latent]

    @property
    def states(self) -> list[tuple[Place, Kind]]:
        """Place and kind of every state tensor, layer by layer."""
        found: list[tuple[Place, Kind]] = []
        for layer in range(self.shape.num_layers):
            found += [(layer, key) for key in sorted(self.shape.recurrent.get(layer, ()))]
            for cache in (cache for cache in self.caches if cache.layer == layer):
                found += [(cache, kind) for kind in self.state_kinds(cache)]
        return found

    @property
    def state_names(self) -> list[tuple[int, str, str]]:
        """Layer, kind and input name of every state tensor."""
        return [
            (place.layer, str(kind), place.state_name(str(kind)))
            if isinstance(place, HeadCache)
            else (place, str(kind[0]), state_name(place, (str(kind[0]), int(kind[1]))))
            for place, kind in self.states
        ]

    def sink_scale(self, layer: int) -> torch.Tensor | None:
        """float32 [Hq], or None if the layer attends to its sinks as the model does."""
        return getattr(self, f"sink_scale_{layer}", None)

    def calibrated(self, layer: int) -> torch.Tensor | None:
        """float32 [Hq] of 0 and 1: heads whose later sinks are scaled down; None: none."""
        return getattr(self, f"calibrated_{layer}", None)

    def empty_state(self, place: Place, kind: Kind) -> torch.Tensor:
        """One state tensor before the first token, all zeros."""
        if isinstance(place, HeadCache):
            return self._empty_cache_state(place, str(kind))
        state = self.shape.recurrent[place][str(kind[0]), int(kind[1])]
        return torch.zeros(self.batch, *state.shape, dtype=state.dtype)

    def _empty_cache_state(self, cache: HeadCache, kind: str) -> torch.Tensor:
        """[B, Hkv, S or W, Dk or Dv], [B, Hkv, W] if it holds scales, [B, Hq, 2, W] if it holds attention."""
        model_dtype, ring = next(self.model.parameters()).dtype, cache.ring
        if kind == MASS_KIND:
            return torch.zeros(self.batch, len(cache.q_heads), 2, ring.window_size)
        length = ring.num_sink_tokens if kind.startswith("sink") else ring.window_size
        rows = (self.batch, len(cache.kv_heads), length)
        if kind in SCALE_KINDS:
            return torch.zeros(rows, dtype=SCALE_DTYPE)
        is_int8 = self.config.has_int8_window and kind.startswith("window")
        dtype = torch.int8 if is_int8 else model_dtype
        return torch.zeros(*rows, cache.key_dim if kind.endswith("_k") else cache.value_dim, dtype=dtype)

    def forward(
        self,
        ids: torch.Tensor,
        position: torch.Tensor,
        states: list[torch.Tensor],
        num_valid: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        tokens = None
        if self.shape.recurrent:
            is_token = ids > NO_TOKEN if num_valid is None else torch.arange(self.num_tokens) < num_valid[:, None]
            ids = torch.maximum(ids, torch.zeros((), dtype=ids.dtype))
            tokens = Tokens(is_token, num_valid, position)
        step = ForwardPass(self, position, states, num_valid, tokens)
        left_out = LeftOut(self.repeats, step, step.attend)
        with (
            attention_inputs(self.model) as step.inputs,
            intercept_attention(self.model, left_out.attend),
            left_out.in_place(),
            static_experts(self.model, in_place=_experts_in_place(self.config)),
            unrolled_experts(self.model, in_place=_experts_in_place(self.config)),
            contextlib.nullcontext() if step.recurrent is None else step.recurrent.in_place(),
            contextlib.nullcontext() if self.all_logits else _only_last_token(self.model, num_valid),
        ):
            output = self.model(
                input_ids=ids,
                position_ids=step.in_cache_positions,  # for queries alone: see `_refuse_other_uses_of_position`
                use_cache=False,
                **with_cache(self.model, step.cache),
            )
        if self.all_logits:
            return output.logits.to(torch.float32), step.next_states
        logits = output.logits if output.logits.shape[1] == 1 else _last_token(output.logits, num_valid)
        return logits[:, 0].to(torch.float32), step.next_states


def _experts_in_place(config: ExportConfig) -> torch.dtype | None:
    """Type of experts' matrices that the target reads where they lie."""
    dtype = target_of(config).experts_in_place
    return None if dtype is None else getattr(torch, dtype)


@contextlib.contextmanager
def _only_last_token(model: Any, num_valid: torch.Tensor | None) -> Iterator[None]:
    """The output projection sees the last token that counts and no other: it is a fifth of a small model's work."""
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None or num_valid is None else find()
    if head is None:
        yield
        return

    def narrow(_module: Any, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (_last_token(arguments[0], num_valid),)

    hook = head.register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        hook.remove()


def _last_token(values: torch.Tensor, num_valid: torch.Tensor | None) -> torch.Tensor:
    """values [B, T, N] of the last token that counts: [B, 1, N]."""
    if num_valid is None:
        return values[:, -1:]
    last = (num_valid - 1).clamp(min=0)[:, None, None].expand(-1, 1, values.shape[-1])
    return values.gather(1, last)
