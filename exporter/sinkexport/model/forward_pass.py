"""What the attention calls of one forward pass share: states, phases, and what each call does with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sinkrt.contract import MASS_KIND, SCALE_KINDS, STATE_KINDS, ActTuning
from sinkrt.ring import Ring

from sinkexport.families.interface import as_many_heads, layer_of, refuse_arguments
from sinkexport.families.latent import CachedPairs, Latent, Pair
from sinkexport.families.rope import RotarySpec
from sinkexport.families.weights_after import WEIGHT
from sinkexport.model.attention import rotated, sink_attention, stream_angles
from sinkexport.model.head_caches import HeadCache
from sinkexport.model.latent import absorbed, output_of_latents
from sinkexport.recurrent.registry import RecurrentStates
from sinkexport.recurrent.states import Tokens

if TYPE_CHECKING:
    from sinkexport.model.decoder import Place, StreamStep


class ForwardPass:
    """One forward pass of a `StreamStep`; its `attend` is the model's attention function for that long."""

    def __init__(
        self,
        stream: StreamStep,
        position: torch.Tensor,
        states: list[torch.Tensor],
        num_valid: torch.Tensor | None,
        tokens: Tokens | None,
    ) -> None:
        """tokens: where there are recurrent states."""
        self._stream = stream
        self._position = position
        self._num_valid = num_valid
        self._states: dict[Place, dict[Any, torch.Tensor]] = {}
        for (place, kind), state in zip(stream.states, states, strict=True):
            self._states.setdefault(place, {})[kind] = state
        self._next: dict[Place, list[torch.Tensor]] = {}
        self.recurrent = None
        if tokens is not None:
            recurrent_states = {layer: self._states[layer] for layer in stream.shape.recurrent}
            self.recurrent = RecurrentStates(stream.model, recurrent_states, tokens)
        self.cache: Any | None = None if self.recurrent is None else self.recurrent.cache
        self._pairs = CachedPairs(self.cache)
        if any(call.latent is not None for call in stream.shape.calls):
            self.cache = self._pairs.cache
        self._angles: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._in_cache_angles: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        last = stream.config.capacity - 1
        self.in_cache_positions = (position[:, None] + torch.arange(stream.num_tokens)).clamp(max=last)  # [B, T]
        self.num_calls = 0
        self.inputs: dict[torch.nn.Module, torch.Tensor] = {}
        """Inputs of the attention modules, see `attention_inputs`."""

    @property
    def next_states(self) -> list[torch.Tensor]:
        if self.recurrent is not None:
            for layer, after in self.recurrent.after().items():
                self._next[layer] = [after[key] for key in self._states[layer]]
        if self.num_calls != len(self._stream.shape.calls):
            raise RuntimeError(f"{self.num_calls} calls of attention; the probe saw {len(self._stream.shape.calls)}")
        return [state for place in self._states for state in self._next[place]]

    def leave_out(self, layer: int) -> None:
        """Hand on the states of a layer that is left out of a trace."""
        for cache in self._stream.caches_of_call[self.num_calls]:
            if cache.layer != layer:
                raise RuntimeError(f"layer {layer} is run where the probe saw layer {cache.layer}")
            self._next[cache] = list(self._states[cache].values())
        self.num_calls += 1

    def attend(
        self,
        module: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        _mask: torch.Tensor | None = None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' attention interface: q [B, Hq, T, Dk], k and v [B, Hkv, T, Dk or Dv] -> [B, T, Hq, Dv].

        s_aux: [Hq], the layer's sink logits. alibi_slopes: [Hq], as the probe saw them.
        """
        index, layer = self.num_calls, layer_of(module)
        self.num_calls += 1
        refuse_arguments(layer, others)
        more = {
            "scale": float(scaling if scaling is not None else q.shape[-1] ** -0.5),
            "softcap": float(softcap or 0.0),
            "alibi_slopes": None if alibi_slopes is None else self._stream.get_buffer("alibi_slopes"),
            "sink_logit": None if s_aux is None else s_aux.to(q.dtype),
            "sink_scale": self._stream.sink_scale(layer),
            "calibrated": self._stream.calibrated(layer),
        }
        if str(layer) in self._stream.affine:
            factors = self._stream.affine[str(layer)](self.inputs[module])
            more |= zip(("affine_scale", "affine_bias"), factors, strict=True)
        q = self._scaled(index, q)
        (k, v), caches = as_many_heads(k, v), self._stream.caches_of_call[index]
        if (latent := self._stream.shape.calls[index].latent) is not None:
            cached = self._cached(caches[0].layer)
            if caches[0].is_latent:
                return self._attend_to_rows(index, latent, cached, q, more).transpose(1, 2), None
            q = latent.rotary_part_first(q)
            k, v = latent.expanded(cached, self._stream.model.get_parameter(latent.weight))
        if len(caches) == 1 and not self._stream.shape.calls[index].is_tiled:
            return self._attend(index, caches[0], q, k, v, more).transpose(1, 2), None
        outputs = []
        for cache in caches:
            kv_heads, q_heads = torch.tensor(cache.kv_heads), torch.tensor(cache.q_heads)
            own = {name: _of_heads(x, q_heads) if isinstance(x, torch.Tensor) else x for name, x in more.items()}
            own_q, own_k, own_v = (x.index_select(1, i) for x, i in ((q, q_heads), (k, kv_heads), (v, kv_heads)))
            outputs.append(self._attend(index, cache, own_q, own_k, own_v, own))
        out, made = torch.cat(outputs, dim=1), [head for cache in caches for head in cache.q_heads]
        if made != sorted(made):
            out = out.index_select(1, torch.tensor([made.index(head) for head in range(len(made))]))
        return out.transpose(1, 2).contiguous(), None  # as families view it: a row of all heads

    def _cached(self, layer: int) -> Pair:
        """What a layer that expands keys and values has just put into transformers' cache."""
        cached = self._pairs.take(layer)
        if cached is None:
            raise RuntimeError(f"nothing was cached in layer {layer}; the probe saw a latent")
        return cached

    def _attend_to_rows(
        self, call: int, latent: Latent, cached: Pair, q: torch.Tensor, more: dict[str, Any]
    ) -> torch.Tensor:
        """Latent attention: q [B, H, T, Dk] -> [B, H, T, Dv]; the model's own keys and values are not used."""
        (cache,), model = self._stream.caches_of_call[call], self._stream.model
        query, row = absorbed(model, latent, cached, q)
        return output_of_latents(model, latent, self._attend(call, cache, query, row, None, more))

    def _attend(
        self,
        call: int,
        cache: HeadCache,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor | None,
        more: dict[str, Any],
    ) -> torch.Tensor:
        """The heads of one cache: q [B, Hq, T, Dk], k and v [B, Hkv, T, Dk or Dv], not rotated -> [B, Hq, T, Dv].

        v: None where rows of k end with the values.
        """
        spec, ring = self._stream.rotary.calls[call], cache.ring
        value_dim = cache.value_dim if v is None else v.shape[-1]
        shift = None
        if spec.order is not None:
            order = torch.tensor(spec.order)
            q, k = q.index_select(-1, order), k.index_select(-1, order)
        if spec.rotary_dim:
            q, k = self._weighed(q, spec) if spec.norms else self._rotated(q, spec), self._rotated(k, spec)
            shift = self._shift(spec, ring, q.dtype)
        states, act = self._states[cache], self._stream.act
        if MASS_KIND not in states:
            more = {**more, "calibrated": None}
        q, k = _widened(q, cache.key_dim), _widened(k, cache.key_dim)
        v = None if v is None else _widened(v, cache.value_dim)
        cos, sin = shift or (None, None)
        out, *updated = sink_attention(
            q=q,
            k=k,
            v=v,
            position=self._position,
            shift_cos=cos,
            shift_sin=sin,
            num_valid=self._num_valid,
            interleaved=spec.interleaved,
            latent_dim=cache.value_dim if v is None else 0,
            **{kind: states.get(kind) for kind in (*STATE_KINDS, *SCALE_KINDS, MASS_KIND)},
            **more,
            **({} if act is None or MASS_KIND not in states else _act_arguments(act)),
        )
        if cache.call == call:  # a call that shares a cache writes what its owner has written: once is enough
            after = dict(zip((*STATE_KINDS, *SCALE_KINDS, MASS_KIND), updated, strict=True))
            self._next[cache] = [after[kind] for kind in states]
        return out if out.shape[-1] == value_dim else out[..., :value_dim]

    def _angles_behind(self, table: str, behind: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [B, T, R/2], the same for all layers."""
        if (table, behind) not in self._angles:
            frequency = self._stream.get_buffer(f"frequency_{table}")
            self._angles[table, behind] = stream_angles(self._position, frequency, self._stream.num_tokens, behind)
        return self._angles[table, behind]

    def _shift(self, spec: RotarySpec, ring: Ring, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos and sin that turn the query back for the sinks; None: the layer keeps none."""
        if not ring.num_sink_tokens:
            return None
        cos, sin = self._angles_behind(spec.table, ring.capacity - 1)
        return cos.to(dtype), sin.to(dtype)

    def _rotated(self, x: torch.Tensor, spec: RotarySpec) -> torch.Tensor:
        scaling = self._stream.rotary.tables[spec.table].scaling
        cos, sin = self._angles_behind(spec.table, 0)
        if scaling != 1.0:
            cos, sin = cos * scaling, sin * scaling
        return rotated(x, cos.to(x.dtype), sin.to(x.dtype), interleaved=spec.interleaved)

    def _scaled(self, call: int, q: torch.Tensor) -> torch.Tensor:
        """Queries [B, Hq, T, D] of a call, times their factors where the model reads positions off its cache.

        Here it has none, and took the tokens for the first T of a text.
        """
        if call not in self._stream.rotary.query_scales:
            return q
        scales = self._stream.get_buffer(f"query_scale_{call}")
        factors = scales[self.in_cache_positions] / scales[: q.shape[2]]  # [B, T]
        return q * factors[:, None, :, None].to(q.dtype)

    def _weighed(self, q: torch.Tensor, spec: RotarySpec) -> torch.Tensor:
        """Queries [B, Hq, T, D] as they meet keys of the window, see `sinkexport.families.weights_after`."""
        (cos, sin), (shift_cos, shift_sin) = (
            self._angles_behind(spec.table, behind) for behind in (0, self._stream.config.capacity - 1)
        )
        if spec.table not in self._in_cache_angles:  # of t less the shift
            back = cos * shift_cos + sin * shift_sin, sin * shift_cos - cos * shift_sin
            self._in_cache_angles[spec.table] = back
        back_cos, back_sin = (x.to(q.dtype) for x in self._in_cache_angles[spec.table])
        q = rotated(q, back_cos, back_sin, interleaved=spec.interleaved)
        for name in spec.norms:
            weight = self._stream.model.get_submodule(name).get_parameter(WEIGHT)
            q = q * (weight if spec.order is None else weight[torch.tensor(spec.order)])
        return rotated(q, shift_cos.to(q.dtype), shift_sin.to(q.dtype), interleaved=spec.interleaved)


def _widened(x: torch.Tensor, size: int) -> torch.Tensor:
    """x [.., n] with zeros up to `size` elements."""
    return x if x.shape[-1] == size else torch.nn.functional.pad(x, (0, size - x.shape[-1]))


def _act_arguments(act: ActTuning) -> dict[str, float]:
    """Arguments of the operator that scale later sinks down."""
    return {"act_alpha": act.alpha, "act_beta": act.beta, "act_min_queries": act.min_queries}


def _of_heads(values: torch.Tensor, q_heads: torch.Tensor) -> torch.Tensor:
    """[Hq] or [.., Hq, ..] of three axes -> those of some heads."""
    return values[q_heads] if values.dim() == 1 else values.index_select(1, q_heads)
