"""An independent streaming reference for any causal LM of transformers: what `verify` measures a bundle against.

It streams as mit-han-lab/streaming-llm does (arXiv:2309.17453). Keys are kept without rotation, and the oldest token
that is no sink is evicted before each step. Then all keys and the query are rotated by their place in the cache. Slow
and obvious, in contrast to an exported graph, which rotates a key once and never touches it again.

Rotation and attention are the model's own functions, called from the model's own source file. Nothing here knows how a
family pairs or lays out its rotary dimensions. With the code that exports, it shares only where a model has its rotary
embedding. A layer in which the model itself sees fewer tokens than the cache holds keeps just those, and no sinks.

It checks what it assumes of a model. Queries and keys must reach attention as the model's own function turns them. A
few tokens, streamed, must have the logits of the model's own pass over all of them at once. A norm after the rotation,
or a state beside attention, breaks that and is refused.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sinkrt.errors import UsageError, problem

from sinkexport.families.adapters import find_adapter
from sinkexport.families.interface import intercept_attention, layer_of, random_embeddings
from sinkexport.families.recurrent import layers_without_attention, recurrent_cache, steps_like_texts, with_cache
from sinkexport.families.rope import find_rotary, replaced_rotary
from sinkexport.reference.affine import AffineReference
from sinkexport.reference.own_attention import (
    NoRotation,
    Recorder,
    calibration,
    no_reference,
    plain_attention,
    rotate_own,
)
from sinkexport.variants.variant import PLAIN, AttentionVariant

Observer = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Callback of each attention: (module, q [B, Hq, 1, D], k and v [B, Hkv, 1, D] of the new token, not rotated,
output [B, 1, Hq, D])."""

PROBE_POSITIONS = (1, 2, 5)
"""Positions of the tokens that are probed. Any but 0 do: at 0 nothing turns."""

NUM_TRIED = 6
"""Tokens that are streamed and passed at once, to see that both give the same."""

LIKE_DENSE = {torch.float16: 0.25, torch.bfloat16: 1.0}
"""Largest difference of a logit between the two, as a share of the logits' spread; 1e-3 in other types."""


@contextlib.contextmanager
def streaming_reference(
    model: Any,
    num_sink_tokens: int,
    window_size: int,
    *,
    observer: Observer | None = None,
    variant: AttentionVariant = PLAIN,
) -> Iterator[StreamingReference]:
    """Make `model` stream with S = num_sink_tokens >= 0 and W = window_size >= 1 for the length of a context.

    variant: what is changed of the model's attention.
    The model is changed inside and left exactly as it was, also after an exception.

    Raises: UsageError if the model does not use transformers' attention interface, or its rotation or its layers
        are not what this reference can follow.
    """
    reference = StreamingReference(model, num_sink_tokens, window_size, observer, variant)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with steps_like_texts(model):
            reference.learn_rotation()
            reference.compare_with_dense()
            with (
                intercept_attention(model, reference.attend),
                reference.no_rotation(),
                reference.affine.watching(model),
            ):
                yield reference
    finally:
        for module in training:  # not model.train(): some modules may have been in evaluation mode
            module.training = True


class StreamingReference:
    """The streams of one `streaming_reference` context: B of them, in step, B being that of the first ids."""

    def __init__(
        self,
        model: Any,
        num_sink_tokens: int,
        window_size: int,
        observer: Observer | None = None,
        variant: AttentionVariant = PLAIN,
    ) -> None:
        if num_sink_tokens < 0 or window_size < 1:
            raise UsageError(
                problem(
                    "sinks and window",
                    received=f"{num_sink_tokens} and {window_size}",
                    expected=">= 0 and >= 1",
                    fix="change the geometry of the stream",
                )
            )
        self.model = model
        self._num_sink_tokens = num_sink_tokens
        self._window_size = window_size
        self._capacity = num_sink_tokens + window_size
        self._num_tokens = 0  # that each stream has been fed
        self._variant = variant
        self._observer = observer
        self.affine = AffineReference(variant.affine)
        # A copy: some change their frequencies by the positions that they are asked for.
        found = find_rotary(model)
        self._rotary_name = "" if found is None else found[0]
        self._rotary: Any = None if found is None else copy.deepcopy(found[1])
        self._rotates: dict[torch.nn.Module, bool] = {}  # by attention module; some layers have no positions
        # k, v [B, Hkv, n, D], unrotated, by attention module and window
        self._cached: dict[tuple[torch.nn.Module, int], tuple[torch.Tensor, torch.Tensor]] = {}
        # What its tokens have received, and from how many queries: see `_receive`.
        self._received: dict[tuple[torch.nn.Module, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._recurrent = recurrent_cache(model)  # of the layers without softmax attention
        self._cos_sin: dict[str | None, tuple[torch.Tensor, torch.Tensor]] = {}  # [1, C, .] each, by type of layer

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed one token to each stream. ids: int64 [B]. Returns logits [B, vocab] in the model's dtype."""
        # Queries may depend on their in-cache position; keys have none before they are rotated.
        position = min(self._num_tokens, self._capacity - 1)
        self._num_tokens += 1
        with torch.no_grad():
            output = self.model(
                input_ids=ids[:, None],
                position_ids=torch.full_like(ids, position)[:, None],
                use_cache=False,
                **with_cache(self.model, self._recurrent),
            )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def reset(self) -> None:
        """Forget all tokens."""
        self._num_tokens = 0
        self._cached.clear()
        self._received.clear()
        self._recurrent = recurrent_cache(self.model)

    def attend(
        self,
        module: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        _mask: torch.Tensor | None = None,
        **arguments: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' attention interface. q: [B, Hq, 1, D], k and v: [B, Hkv, 1, D] -> [B, 1, Hq, D]."""
        windows = self._variant.windows(layer_of(module), k.shape[1], self._window_size)
        if len(set(windows)) == 1:
            out = self._attended(module, q, k, v, windows[0], arguments)
        else:
            # All heads, once for each window; each head takes the result of its own.
            group = q.shape[1] // k.shape[1]
            by_head = [window for window in windows for _ in range(group)]
            outs = {window: self._attended(module, q, k, v, window, arguments) for window in set(by_head)}
            out = torch.stack([outs[window][:, :, head] for head, window in enumerate(by_head)], dim=2)
        if self._observer is not None:
            self._observer(module, q, k, v, out)
        return out, None

    def _attended(
        self,
        module: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        window_size: int,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        """[B, 1, Hq, D], with a window of this size."""
        keys, values = self._append(module, k, v, arguments.get("sliding_window"), window_size)
        if self._rotates[module]:
            cos, sin = self._places(module, keys)
            q = self._rotated(module, q, cos[:, -1:], sin[:, -1:])
            keys = self._rotated(module, keys, cos, sin)
        # The family's own plain attention knows its groups, softcap and whatever else it passes along.
        mask = self._mask(module, keys)
        out, weights = plain_attention(module)(module, q, keys, values, mask, **arguments)[:2]
        act = self._variant.act
        if act is not None and any(act.heads[layer_of(module)]):
            received, queries = self._receive(module, window_size, weights)
            factors = calibration(act, layer_of(module), weights, received, queries, self._num_sink_tokens)
            mask = factors.log().to(keys.dtype) + (0 if mask is None else mask)
            out = plain_attention(module)(module, q, keys, values, mask, **arguments)[0]
        return self.affine.changed(module, out, values, torch.ones(1, values.shape[2], dtype=torch.bool))

    def _receive(
        self, module: torch.nn.Module, window_size: int, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add weights [B, Hq, 1, n] to what cached tokens have received.

        Returns: their sums, float64 [B, Hq, 1, n], and from how many queries, [1, n].
        """
        key, num_sinks = (module, window_size), self._num_sink_tokens
        pair = self._received.get(key, (weights.double()[..., :0], torch.zeros(1, 0)))
        if pair[1].numel() == num_sinks + window_size:  # the cache was full: see `_append`
            pair = tuple(torch.cat((x[..., :num_sinks], x[..., num_sinks + 1 :]), dim=-1) for x in pair)
        received, queries = (torch.nn.functional.pad(x, (0, 1)) for x in pair)  # the new token
        self._received[key] = received + weights.double(), queries + 1
        return self._received[key]

    def _mask(self, module: Any, keys: torch.Tensor) -> torch.Tensor | None:
        """Summand of the logits, [1, Hq, 1, n]: token 0 is the oldest in the cache. None: nothing is added."""
        tuning = self._variant.sink_tuning
        if tuning is None:
            return None
        factors = torch.tensor(tuning.first_token_scale[layer_of(module)], dtype=torch.float64)
        mask = torch.zeros(1, factors.numel(), 1, keys.shape[2], dtype=torch.float64)
        mask[0, :, 0, 0] = factors.log()
        return mask.to(keys.dtype)

    def learn_rotation(self) -> None:
        """Find the layers that rotate, and make sure that this file rotates as the model does, queries and keys.

        A few tokens, random vectors in the place of embeddings, are run with the model's rotation and without;
        attention gives zeros, so that the layers see the same hidden states both times.

        Raises: UsageError.
        """
        plain = self._recorded(rotation=False)
        turned = self._recorded(rotation=True)
        far = self._recorded(rotation=False, shift=self._capacity)
        num_layers = self.model.config.get_text_config().num_hidden_layers - len(layers_without_attention(self.model))
        if len(plain) != num_layers:
            raise no_reference(f"{len(plain)} attention layers of {num_layers}", "softmax attention in every layer")
        for module, before in plain.items():
            if not all(torch.equal(x, y) for x, y in zip(before, far[module], strict=True)):
                raise no_reference("queries or keys that are a function of position beside rotation", "plain rotation")
            after = turned[module]
            self._rotates[module] = not all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
            if not self._rotates[module]:
                continue
            cos, sin = self._rotary(before[0], torch.tensor([PROBE_POSITIONS]), **self._layer_type(module))
            for name, x, y in zip(("query", "key"), before, after, strict=True):
                wanted = self._rotated(module, x, cos, sin)
                # Of each head, on its own scale: a tiny one is no excuse.
                error, size = ((t.double()).abs().amax(dim=-1) for t in (y - wanted, x))
                if not bool((error <= 64 * torch.finfo(x.dtype).eps * size).all()):
                    raise no_reference(f"a {name} that is more than a rotation of its unrotated self", "plain rotation")

    def compare_with_dense(self) -> None:
        """Make sure that a few tokens, streamed one by one, have the logits of the model's own pass over all of them.

        Raises: UsageError.
        """
        stream = StreamingReference(self.model, 0, NUM_TRIED)
        stream._rotates = self._rotates
        vocab_size = self.model.config.get_text_config().vocab_size
        ids = torch.randint(vocab_size, (1, NUM_TRIED), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            dense = self.model(input_ids=ids, use_cache=False).logits[0].double()  # [n, vocab]
        with intercept_attention(self.model, stream.attend), stream.no_rotation():
            streamed = torch.cat([stream.step(column) for column in ids.T]).double()
        error = ((streamed - dense).abs().amax(dim=-1) / dense.std(dim=-1).clamp(min=1e-9)).max()
        dtype = next(self.model.parameters()).dtype
        if not float(error) <= LIKE_DENSE.get(dtype, 1e-3):
            raise no_reference(
                f"{NUM_TRIED} tokens whose logits, streamed, are {float(error):.1e} of the spread from "
                "those of one pass",
                "no state but what attention keeps",
            )

    @contextlib.contextmanager
    def no_rotation(self) -> Iterator[None]:
        """The model's rotary embedding hands out cos = 1 and sin = 0: x * 1 + rotate_half(x) * 0 is x exactly."""
        if self._rotary is None:
            yield
            return
        with replaced_rotary(self.model, {self._rotary_name: NoRotation(self._rotary)}):
            yield

    def _append(
        self, module: torch.nn.Module, k: torch.Tensor, v: torch.Tensor, sliding_window: int | None, window_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Evict the oldest token that is no sink if the cache is full, then add the new one: [B, Hkv, n, D]."""
        key = module, window_size
        num_sinks, window_size = self._geometry(sliding_window, window_size)
        capacity = num_sinks + window_size
        if key in self._cached:
            keys, values = self._cached[key]
            if keys.shape[2] == capacity:
                keys, values = (
                    torch.cat((x[:, :, :num_sinks], x[:, :, num_sinks + 1 :]), dim=2) for x in (keys, values)
                )
            k, v = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
        self._cached[key] = (k, v)
        return k, v

    def _geometry(self, sliding_window: int | None, window_size: int) -> tuple[int, int]:
        """Sinks and window of a layer in which the model itself sees sliding_window tokens; None: all."""
        if sliding_window is not None and sliding_window < self._num_sink_tokens + window_size:
            return 0, sliding_window
        return self._num_sink_tokens, window_size

    def rotates(self, module: torch.nn.Module) -> bool:
        """Whether an attention module has positions."""
        return self._rotates[module]

    def turned(self, module: Any, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """x [B, H, n, D] turned as the model turns tokens at these places, int64 [n]."""
        return self._rotated(module, x, *self._rotary(x, places[None], **self._layer_type(module)))

    def _places(self, module: Any, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's own cos and sin of in-cache positions 0 .. n-1, [1, n, .], n = keys.shape[2].

        The model is asked for those of a full cache: some rotate by the length of the text, and the keys of a shorter
        one would not fit the next one's.
        """
        layer_type = self._layer_type(module)
        key = layer_type.get("layer_type")
        if key not in self._cos_sin:
            self._cos_sin[key] = self._rotary(keys, torch.arange(self._capacity)[None], **layer_type)
        cos, sin = self._cos_sin[key]
        return cos[:, : keys.shape[2]], sin[:, : keys.shape[2]]

    def _layer_type(self, module: Any) -> dict[str, str]:
        """The further argument of a rotary embedding that has frequencies for each type of layer."""
        if isinstance(getattr(self._rotary, "rope_type", None), dict):
            return {"layer_type": module.config.layer_types[module.layer_idx]}
        return {}

    def _rotated(self, module: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate x [B, H, n, D] with the family's own function; cos, sin: [1, n, R or R/2].

        Some families slice off the R dimensions that turn before they call it and some leave that to the function,
        which then takes R dimensions as well.
        """
        prefix = "".join(f"{layer_type}_" for layer_type in self._layer_type(module).values())
        rotary_dim = 2 * self._rotary.get_buffer(f"{prefix}inv_freq").numel()
        adapter = find_adapter(self.model)
        if adapter is not None and adapter.rotate is not None:
            rotated: torch.Tensor = adapter.rotate(module, x, cos, sin)
            return rotated
        turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        turned = rotate_own(module, turned, cos, sin)
        return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned

    def _recorded(self, *, rotation: bool, shift: int = 0) -> dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]:
        """Each attention's queries and keys [1, H, n, D] for tokens `shift` after PROBE_POSITIONS, by module."""
        recorder = Recorder()
        swapped = contextlib.nullcontext() if rotation else self.no_rotation()
        positions = torch.tensor([PROBE_POSITIONS]) + shift
        ids = torch.arange(len(PROBE_POSITIONS))[None]
        with (
            torch.no_grad(),
            random_embeddings(self.model, len(PROBE_POSITIONS), seed=1),
            intercept_attention(self.model, recorder),
            swapped,
        ):
            self.model(input_ids=ids, position_ids=positions, use_cache=False)
        return recorder.given
