"""T tokens of a Hugging Face model over explicit state tensors, as a module that can be traced.

The model's own code runs unchanged; only two things are swapped for the length of a trace. Its rotary embedding
hands out cos = 1 and sin = 0 (so the model's rotation is the identity, which `fold_rotation` removes from the
trace), and its attention function rotates once with exact phase and calls the sink-attention operator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from sinkrt.contract import SCALE_KINDS, STATE_KINDS
from sinkrt.errors import UsageError, problem

from sinkexport.config import ExportConfig
from sinkexport.model.attention import sink_attention, stream_angles
from sinkexport.model.fold_rotation import fold_rotation
from sinkexport.model.int8_rows import SCALE_DTYPE
from sinkexport.model.interface import intercept_attention
from sinkexport.model.rope import (
    AttentionShape,
    HandedOutRotary,
    ModelRotary,
    find_rotary,
    lay_out,
    replaced_module,
)

IGNORED_ARGUMENTS = frozenset(
    # What families pass to the attention function without changing what a single step computes.
    ("dropout", "position_ids", "cache_position", "use_cache", "output_attentions", "is_causal", "training",
     "output_hidden_states", "return_dict", "logits_to_keep", "past_key_values", "position_embeddings",
     "token_type_ids", "deterministic", "output_router_logits")
)  # fmt: skip


class StreamStep(torch.nn.Module):
    """``forward(ids, position, states, num_valid) -> (logits, next states)``: T tokens of each of B streams.

    ids: int64 [B, T]. position: int64 [B], of the first token. states: layer by layer, in the order of ``state_kinds``.
    num_valid: int64 [B], how many of the T tokens count; left out if T = 1.
    logits: float32 [B, vocab], after the last token that counts.
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
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.shape = shape
        self.rotary = rotary
        self.batch = batch
        self.num_tokens = num_tokens
        self.register_buffer("frequency", rotary.frequency, persistent=False)
        tuning = config.sink_tuning
        for layer, factors in enumerate(() if tuning is None else tuning.first_token_scale):
            if set(factors) != {1.0}:  # a layer without any stays as it is, to the byte
                self.register_buffer(f"sink_scale_{layer}", torch.tensor(factors), persistent=False)

    @property
    def state_kinds(self) -> tuple[str, ...]:
        """State tensors of a layer, in the order in which `states` holds them."""
        kinds = STATE_KINDS if self.config.num_sink_tokens else STATE_KINDS[2:]
        return (*kinds, *SCALE_KINDS) if self.config.has_int8_window else kinds

    def sink_scale(self, layer: int) -> torch.Tensor | None:
        """float32 [Hq], or None if the layer attends to its sinks as the model does."""
        return dict(self.named_buffers(recurse=False)).get(f"sink_scale_{layer}")

    def empty_state(self, kind: str) -> torch.Tensor:
        """One state tensor before the first token: [B, Hkv, S or W, D], or [B, Hkv, W] if it holds scales."""
        length = self.config.num_sink_tokens if kind.startswith("sink") else self.config.window_size
        rows = (self.batch, self.shape.num_kv_heads, length)
        if kind in SCALE_KINDS:
            return torch.zeros(rows, dtype=SCALE_DTYPE)
        is_int8 = self.config.has_int8_window and kind.startswith("window")
        dtype = torch.int8 if is_int8 else next(self.model.parameters()).dtype
        return torch.zeros(*rows, self.shape.head_dim, dtype=dtype)

    def forward(
        self,
        ids: torch.Tensor,
        position: torch.Tensor,
        states: list[torch.Tensor],
        num_valid: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        step = _Step(self, position, states, num_valid)
        with intercept_attention(self.model, step.attend), _only_last_token(self.model, num_valid):
            # position_ids reach the model only so that `_refuse_other_uses_of_position` can see who reads them.
            positions = position[:, None] + torch.arange(self.num_tokens)  # [B, T]
            output = self.model(input_ids=ids, position_ids=positions, use_cache=False)
        logits = output.logits if output.logits.shape[1] == 1 else _last_token(output.logits, num_valid)
        return logits[:, 0].to(torch.float32), step.next_states


class _Step:
    """What the attention calls of one forward pass share."""

    def __init__(
        self,
        stream: StreamStep,
        position: torch.Tensor,
        states: list[torch.Tensor],
        num_valid: torch.Tensor | None,
    ) -> None:
        self._stream = stream
        self._position = position
        self._num_valid = num_valid
        per_layer = len(stream.state_kinds)
        self._states = [states[i : i + per_layer] for i in range(0, len(states), per_layer)]
        self._next: list[list[torch.Tensor] | None] = [None] * len(self._states)
        frequency, num_tokens = stream.get_buffer("frequency"), stream.num_tokens
        self._cos, self._sin = stream_angles(position, frequency, num_tokens, 0)  # [B, T, R/2]
        behind = stream.config.capacity - 1
        self._shift_cos, self._shift_sin = stream_angles(position, frequency, num_tokens, behind)

    @property
    def next_states(self) -> list[torch.Tensor]:
        if any(layer is None for layer in self._next):
            raise RuntimeError("an attention layer did not run; the probe should have refused this model")
        return [state for layer in self._next if layer is not None for state in layer]

    def attend(
        self,
        module: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        _mask: torch.Tensor | None = None,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' attention interface: q [B, Hq, T, D], k and v [B, Hkv, T, D] -> [B, T, Hq, D]."""
        config, layer = self._stream.config, int(module.layer_idx)
        refuse_arguments(layer, config, sliding_window, others)
        spec = self._stream.rotary.layers[layer]
        shift = (None, None)
        if spec.rotary_dim:
            q, k = (self._rotated(x, layer) for x in (q, k))
            shift = (self._shift_cos.to(q.dtype), self._shift_sin.to(q.dtype))
        kinds = self._stream.state_kinds
        states = dict(zip(kinds, self._states[layer], strict=True))
        out, *updated = sink_attention(
            q, k, v, *(states.get(kind) for kind in STATE_KINDS), self._position,
            *(shift if config.num_sink_tokens else (None, None)), self._num_valid,
            float(scaling if scaling is not None else q.shape[-1] ** -0.5), float(softcap or 0.0), spec.interleaved,
            *(states.get(kind) for kind in SCALE_KINDS), self._stream.sink_scale(layer),
        )  # fmt: skip
        after = dict(zip((*STATE_KINDS, *SCALE_KINDS), updated, strict=True))
        self._next[layer] = [after[kind] for kind in kinds]
        return out.transpose(1, 2), None  # [B, T, Hq, D]

    def _rotated(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        spec, scaling = self._stream.rotary.layers[layer], self._stream.rotary.scaling
        cos, sin = self._cos, self._sin
        if scaling != 1.0:
            cos, sin = cos * scaling, sin * scaling
        partial = spec.rotary_dim if spec.rotary_dim < x.shape[-1] else 0  # 0: all of the head
        return torch.onnx.ops.rotary_embedding(
            x, cos.to(x.dtype), sin.to(x.dtype), interleaved=spec.interleaved, rotary_embedding_dim=partial
        )


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


def trace(stream: StreamStep) -> torch.export.ExportedProgram:
    """Trace one run, with the model's own rotation folded away. Parameters are not copied.

    Raises: UsageError if the model reads positions anywhere but in its rotary embedding.
    """
    ids = torch.zeros(stream.batch, stream.num_tokens, dtype=torch.int64)
    position = torch.zeros(stream.batch, dtype=torch.int64)
    dtype = next(stream.model.parameters()).dtype
    kinds = stream.state_kinds * stream.shape.num_layers
    states = [stream.empty_state(kind) for kind in kinds]
    num_valid = () if stream.num_tokens == 1 else (torch.ones_like(position),)
    with torch.no_grad(), _identity_rotation(stream, dtype):
        program = torch.export.export(stream, (ids, position, states, *num_valid), strict=False)
    fold_rotation(program)
    _refuse_other_uses_of_position(program)
    return program


def _refuse_other_uses_of_position(program: torch.export.ExportedProgram) -> None:
    """Learned positions, ALiBi or length-dependent scaling read the position ids that the model is handed."""
    _, position, *_ = program.graph_signature.user_inputs
    ours = (torch.ops.sinkexport.stream_angles.default, torch.ops.sinkexport.sink_attention.default)
    node = next(n for n in program.graph_module.graph.nodes if n.name == position)
    strangers = [user for user in node.users if user.target not in ours]
    if strangers:
        raise UsageError(
            problem(
                "positions",
                received=f"a use outside the rotary embedding ({strangers[0].target})",
                expected="rotary positions only",
                fix="this model cannot be exported exactly",
            )
        )


@contextlib.contextmanager
def _identity_rotation(stream: StreamStep, dtype: torch.dtype) -> Iterator[None]:
    name, _ = find_rotary(stream.model)
    shape = (stream.batch, stream.num_tokens, stream.rotary.frequency.numel())
    ones = lay_out(torch.ones(shape, dtype=dtype), stream.rotary.cos_layout)
    with replaced_module(stream.model, name, HandedOutRotary(ones, torch.zeros_like(ones))):
        yield


def refuse_arguments(layer: int, config: ExportConfig, sliding_window: int | None, others: dict[str, Any]) -> None:
    """Refuse what a family passes to its attention function and the operator does not know."""
    if sliding_window is not None and sliding_window < config.capacity:
        raise UsageError(
            problem(
                "sinks + window",
                received=f"{config.capacity} tokens, more than layer {layer}'s own sliding window",
                expected=f"at most {sliding_window} tokens",
                fix="lower --window",
            )
        )
    unknown = sorted(key for key, value in others.items() if value is not None and key not in IGNORED_ARGUMENTS)
    if unknown:
        raise UsageError(
            problem(
                "attention",
                received=f"the argument '{unknown[0]}' in layer {layer}",
                expected="plain softmax attention",
                fix="this model cannot be exported exactly",
            )
        )
