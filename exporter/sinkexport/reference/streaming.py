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
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sinkrt.errors import UsageError, problem

from sinkexport.families.interface import intercept_attention, layer_of
from sinkexport.families.recurrent import recurrent_cache, steps_like_texts, with_cache
from sinkexport.reference.affine import AffineReference
from sinkexport.reference.own_attention import calibration, no_reference, plain_attention
from sinkexport.reference.own_rotation import OwnRotation
from sinkexport.variants.variant import PLAIN, AttentionVariant

Observer = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Callback of each attention: (module, q [B, Hq, 1, D], k and v [B, Hkv, 1, D] of the new token, not rotated,
output [B, 1, Hq, D])."""

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
            reference.rotation.learn()
            reference.compare_with_dense()
            with (
                intercept_attention(model, reference.attend),
                reference.rotation.removed(),
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
        self.rotation = OwnRotation(model, self._capacity)
        # k, v [B, Hkv, n, D], unrotated, by attention module and window
        self._cached: dict[tuple[torch.nn.Module, int], tuple[torch.Tensor, torch.Tensor]] = {}
        # What its tokens have received, and from how many queries: see `_receive`.
        self._received: dict[tuple[torch.nn.Module, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._recurrent = recurrent_cache(model)  # of the layers without softmax attention

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
        if self.rotation.rotates(module):
            cos, sin = self.rotation.places(module, keys)
            q = self.rotation.rotated(module, q, cos[:, -1:], sin[:, -1:])
            keys = self.rotation.rotated(module, keys, cos, sin)
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

    def compare_with_dense(self) -> None:
        """Make sure that a few tokens, streamed one by one, have the logits of the model's own pass over all of them.

        Raises: UsageError.
        """
        stream = StreamingReference(self.model, 0, NUM_TRIED)
        stream.rotation = self.rotation.of_capacity(NUM_TRIED)
        vocab_size = self.model.config.get_text_config().vocab_size
        ids = torch.randint(vocab_size, (1, NUM_TRIED), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            dense = self.model(input_ids=ids, use_cache=False).logits[0].double()  # [n, vocab]
        with intercept_attention(self.model, stream.attend), stream.rotation.removed():
            streamed = torch.cat([stream.step(column) for column in ids.T]).double()
        error = ((streamed - dense).abs().amax(dim=-1) / dense.std(dim=-1).clamp(min=1e-9)).max()
        dtype = next(self.model.parameters()).dtype
        if not float(error) <= LIKE_DENSE.get(dtype, 1e-3):
            raise no_reference(
                f"{NUM_TRIED} tokens whose logits, streamed, are {float(error):.1e} of the spread from "
                "those of one pass",
                "no state but what attention keeps",
            )

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
