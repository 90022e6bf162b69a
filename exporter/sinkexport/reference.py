"""An independent streaming reference for any causal LM of transformers: what `verify` measures a bundle against.

It streams as mit-han-lab/streaming-llm does (arXiv:2309.17453): keys are kept without rotation, the oldest token
that is no sink is thrown out before each step, and then all keys and the query are rotated by their place in the
cache. Slow and obvious, in contrast to an exported graph, which rotates a key once and never touches it again.

Rotation and attention are the model's own functions, called from the model's own source file. Nothing here knows
how a family pairs or lays out its rotary dimensions, and nothing is shared with the code that exports rotation.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from sinkrt.errors import UsageError, problem

from sinkexport.model.interface import intercept_attention

Observer = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Told of each attention: (module, q [B, Hq, 1, D], k and v [B, Hkv, 1, D] of the new token, not rotated,
output [B, 1, Hq, D])."""

PROBE_POSITION = 5
"""Where the probe looks at a rotated token. Any position but 0 does: at 0 nothing turns."""


@contextlib.contextmanager
def streaming_reference(
    model: Any,
    num_sink_tokens: int,
    window_size: int,
    *,
    observer: Observer | None = None,
    first_token_scale: Sequence[Sequence[float]] | None = None,
) -> Iterator[StreamingReference]:
    """Make `model` stream with S = num_sink_tokens >= 0 and W = window_size >= 1 for the length of a context.

    first_token_scale: [L][Hq], factors on the attention weight of token 0 (ZeroTuning, arXiv:2505.11739); needs S >= 1.
    The model is changed inside and left exactly as it was, also after an exception.

    Raises: UsageError if the model does not use transformers' attention interface, or its rotation or its layers
        are not what this reference can follow.
    """
    reference = StreamingReference(model, num_sink_tokens, window_size, observer, first_token_scale)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        reference.learn_rotation()
        with intercept_attention(model, reference.attend), reference.no_rotation():
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
        first_token_scale: Sequence[Sequence[float]] | None = None,
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
        self._model = model
        self._num_sink_tokens = num_sink_tokens
        self._capacity = num_sink_tokens + window_size
        self._observer = observer
        self._first_token_scale = first_token_scale
        self._rotary_parent, self._rotary = _find_rotary(model)
        self._rotates: dict[torch.nn.Module, bool] = {}  # by attention module; some layers have no positions
        self._cached: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}  # k, v [B, Hkv, n, D], unrotated
        self._cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None  # [1, n, .] each, for the cache's n places

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed one token to each stream. ids: int64 [B]. Returns logits [B, vocab] in the model's dtype."""
        with torch.no_grad():
            output = self._model(input_ids=ids[:, None], position_ids=torch.zeros_like(ids)[:, None], use_cache=False)
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def reset(self) -> None:
        """Forget all tokens."""
        self._cached.clear()

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
        _refuse_own_window(arguments.get("sliding_window"), self._capacity)
        keys, values = self._append(module, k, v)
        query = q
        if self._rotates[module]:
            cos, sin = self._places(keys)
            query = _rotated(module, q, cos[:, -1:], sin[:, -1:])
            keys = _rotated(module, keys, cos, sin)
        # The family's own plain attention knows its groups, softcap and whatever else it passes along.
        out: torch.Tensor = own_function(module, "eager_attention_forward")(
            module, query, keys, values, self._mask(module, keys), **arguments
        )[0]
        if self._observer is not None:
            self._observer(module, q, k, v, out)
        return out, None

    def _mask(self, module: Any, keys: torch.Tensor) -> torch.Tensor | None:
        """What is added to the logits, [1, Hq, 1, n]: token 0 is the oldest in the cache. None: nothing."""
        if self._first_token_scale is None:
            return None
        factors = torch.tensor(self._first_token_scale[int(module.layer_idx)], dtype=torch.float64)
        mask = torch.zeros(1, factors.numel(), 1, keys.shape[2], dtype=torch.float64)
        mask[0, :, 0, 0] = factors.log()
        return mask.to(keys.dtype)

    def learn_rotation(self) -> None:
        """Find the layers that rotate, and make sure that this file rotates as the model does.

        One token is run with the model's rotation and without; attention gives zeros, so that the layers see the
        same hidden states both times.

        Raises: UsageError.
        """
        plain = self._recorded(rotation=False)
        turned = self._recorded(rotation=True)
        num_layers = self._model.config.get_text_config().num_hidden_layers
        if len(plain) != num_layers:
            raise _refused(f"{len(plain)} attention layers of {num_layers}", "softmax attention in every layer")
        cos, sin = self._rotary(next(iter(plain.values())), torch.tensor([[PROBE_POSITION]]))
        for module, before in plain.items():
            after = turned[module]
            self._rotates[module] = not torch.equal(before, after)
            if self._rotates[module]:
                tolerance = 64 * torch.finfo(before.dtype).eps * float(before.abs().max())
                if not torch.allclose(_rotated(module, before, cos, sin), after, rtol=0, atol=tolerance):
                    raise _refused("a query that is more than a rotation of its unrotated self", "plain rotation")

    @contextlib.contextmanager
    def no_rotation(self) -> Iterator[None]:
        """The model's rotary embedding hands out cos = 1 and sin = 0: x * 1 + rotate_half(x) * 0 is x exactly."""
        name = next(key for key, module in self._rotary_parent.named_children() if module is self._rotary)
        setattr(self._rotary_parent, name, _NoRotation(self._rotary))
        try:
            yield
        finally:
            setattr(self._rotary_parent, name, self._rotary)

    def _append(self, module: torch.nn.Module, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Throw out the oldest token that is no sink if the cache is full, then add the new one: [B, Hkv, n, D]."""
        if module in self._cached:
            keys, values = self._cached[module]
            if keys.shape[2] == self._capacity:
                keys, values = (
                    torch.cat((x[:, :, : self._num_sink_tokens], x[:, :, self._num_sink_tokens + 1 :]), dim=2)
                    for x in (keys, values)
                )
            k, v = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
        self._cached[module] = (k, v)
        return k, v

    def _places(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's own cos and sin of in-cache positions 0 .. n-1, [1, n, .], n = keys.shape[2].

        They stay the same from the step on that fills the cache, and are the same in all layers.
        """
        if self._cos_sin is None or self._cos_sin[0].shape[1] != keys.shape[2]:
            self._cos_sin = self._rotary(keys, torch.arange(keys.shape[2])[None])
        return self._cos_sin

    def _recorded(self, *, rotation: bool) -> dict[torch.nn.Module, torch.Tensor]:
        """Each attention's query [1, Hq, 1, D] for one token at PROBE_POSITION, by module."""
        recorder = _Recorder()
        swapped = contextlib.nullcontext() if rotation else self.no_rotation()
        position = torch.tensor([[PROBE_POSITION]])
        with torch.no_grad(), intercept_attention(self._model, recorder), swapped:
            self._model(input_ids=torch.ones_like(position), position_ids=position, use_cache=False)
        return recorder.queries


class _Recorder:
    """An attention function that writes down the queries and returns zeros."""

    def __init__(self) -> None:
        self.queries: dict[torch.nn.Module, torch.Tensor] = {}

    def __call__(
        self, module: Any, q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        if module in self.queries:
            raise _refused("layers that share one attention module", "a module for each layer")
        self.queries[module] = q
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3]), None  # [B, 1, Hq, Dv]


class _NoRotation(torch.nn.Module):
    """A rotary embedding that turns nothing, with cos and sin shaped as the original's."""

    def __init__(self, original: torch.nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.original(*args, **kwargs)
        return torch.ones_like(cos), torch.zeros_like(sin)


def _rotated(module: torch.nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [B, H, n, D] with the family's own function; cos, sin: [1, n, R].

    Some families slice off the R dimensions that turn before they call it and some leave that to the function,
    which then takes R dimensions as well.
    """
    rotary_dim = cos.shape[-1]
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    apply = own_function(module, "apply_rotary_pos_emb")
    _, turned = apply(turned[:, :0], turned, cos, sin)  # takes queries and keys: no queries here
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def own_function(module: torch.nn.Module, name: str) -> Callable[..., Any]:
    """A function of the source file in which the module's class is."""
    source = sys.modules[type(module).__module__]
    function: Callable[..., Any] | None = getattr(source, name, None)
    if function is None:
        raise _refused(f"{source.__name__} without {name}()", "a family built like Llama")
    return function


def _find_rotary(model: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(parent, rotary embedding) of a model that has one."""
    found = [
        (model.get_submodule(name.rpartition(".")[0]), module)
        for name, module in model.named_modules()
        if name.split(".")[-1] == "rotary_emb" and hasattr(module, "inv_freq")
    ]
    if len(found) != 1:
        raise _refused(f"{len(found)} rotary embeddings with one set of frequencies", "exactly one")
    return found[0]


def _refuse_own_window(sliding_window: int | None, capacity: int) -> None:
    if sliding_window is not None and sliding_window < capacity:
        raise UsageError(
            problem(
                "sinks + window",
                received=f"{capacity} tokens, more than the model's own sliding window",
                expected=f"at most {sliding_window} tokens",
                fix="use a smaller window",
            )
        )


def _refused(received: str, expected: str) -> UsageError:
    return UsageError(
        problem("model", received=received, expected=expected, fix="there is no streaming reference for this model")
    )
