"""A streaming reference for any causal LM of transformers, however it makes its queries, keys and positions.

`sinkexport.reference.streaming` takes rotation out of a model and puts it back, which not every model allows. Here the
model's own code does all of that. A token's view of its cache is laid out as a short text, oldest token first. The
model is run on it as on any other text, with the positions that such a text has. The n-th attention call of the pass
then has the cached tokens' keys at their in-cache positions, and its output for the newest token is computed in
float64. All tokens before it get the output that they had when they were the newest. So hidden states are never
recomputed from a cut text, only what a call is given is.

This follows shared keys, two calls in a layer, norms after the rotation, factors of position, latent attention and
indexers alike. Where something beside attention carries a state, the text is the whole stream so far; cached tokens
have their in-cache positions then, and evicted ones are not attended to.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from sinkrt.errors import UsageError, problem

from sinkexport.families.interface import intercept_attention, layer_of, own_values, random_embeddings
from sinkexport.reference.call_attention import (
    CallArguments,
    View,
    attended,
    call_arguments,
    causal_masks,
    check_visible,
    visible_window,
    with_indices,
)
from sinkexport.variants.variant import PLAIN, AttentionVariant

TOKENS_PER_PASS = 4096
"""Tokens of all rows of one pass, about: a pass has at least the rows of one token."""

NUM_TRIED = 8
"""Tokens of a text that shows whether anything but attention carries a state."""

IS_CHANGED = 1e-4
"""Change of a tensor, as a share of its largest number, that is more than rounding."""


@contextlib.contextmanager
def calls_reference(
    model: Any, num_sink_tokens: int, window_size: int, variant: AttentionVariant = PLAIN
) -> Iterator[CallsReference]:
    """Make `model` stream with S = num_sink_tokens >= 0 and W = window_size >= 1 for the length of a context.

    variant: what is changed of the model's attention: per-head windows, or a factor on token 0.
    The model, changed inside, is left as it was, also after an exception.

    Raises: UsageError if the model does not use transformers' attention interface; for a variant that is not known
        here.
    """
    if variant.affine is not None or variant.act is not None:
        raise _refused("weights of attention that are changed after the softmax", "the model's own attention")
    reference = CallsReference(model, num_sink_tokens, window_size, variant)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with intercept_attention(model, reference.attend, causal_masks, own_indexers=True):
            yield reference
    finally:
        for module in training:
            module.training = True


@dataclasses.dataclass(frozen=True)
class _Row:
    """The text that shows a token's view of its cache.

    tokens: their indices in the stream. positions: None if they are those of any text. newest: index of the token in
    the text. cached: indices of those it attends to, itself included, oldest first.
    """

    tokens: list[int]
    positions: list[int] | None
    newest: int
    cached: list[int]


@dataclasses.dataclass
class _Pass:
    """One pass of the model. rows: of all views, by time; None in the first pass. call: attention calls so far."""

    times: range
    rows: list[dict[View, _Row]] | None
    call: int = 0


class CallsReference:
    """The streams of one `calls_reference` context. See `logits`."""

    def __init__(self, model: Any, num_sink_tokens: int, window_size: int, variant: AttentionVariant) -> None:
        self._model = model
        self._num_sink_tokens, self._window_size = num_sink_tokens, window_size
        self._capacity = num_sink_tokens + window_size
        self._variant = variant
        self._batch = 1
        self._pass = _Pass(range(0), None)
        self._num_tokens = 0
        # By attention call: outputs [N, B, Hq, Dv] of all tokens so far, and the view of each key head.
        self._outputs: list[torch.Tensor] = []
        self._views: list[tuple[View, ...]] = []
        self._tried: list[torch.Tensor] | None = None  # of the text that is tried, what its last token shows

    def logits(self, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """Stream ids int64 [B, N] from the start, N >= 1. Yields logits [B, vocab] after each token, model's dtype.

        Raises: UsageError for an attention with arguments that are not known, or a mask other than a window's.
        """
        self._batch, self._num_tokens = ids.shape
        self._outputs, self._views = [], []
        ids = torch.nn.functional.pad(ids, (0, max(0, self._capacity - ids.shape[1])))
        carries_state, start = self._carries_state(), self._start
        yield from self._first_tokens(ids)[: min(start, self._num_tokens)]
        while start < self._num_tokens:
            views = list(dict.fromkeys(view for views in self._views for view in views)) or [
                View(self._num_sink_tokens, self._window_size)
            ]
            length = self._num_tokens if carries_state else self._capacity
            at_once = max(1, TOKENS_PER_PASS // (length * len(views) * self._batch))
            times = range(start, min(start + at_once, self._num_tokens))
            yield from self._next_tokens(ids, times, views, carries_state)
            start = times.stop

    @property
    def _start(self) -> int:
        """Tokens before the first eviction."""
        return self._num_sink_tokens + self._variant.shortest_window(self._window_size)

    def affordable(self, num_tokens: int, batch: int, max_work: float) -> int:
        """The first of num_tokens tokens of each stream that take no more than max_work parameters times tokens.

        They are no fewer than those of the first pass, up to the first eviction.
        """
        num_parameters = sum(parameter.numel() for parameter in self._model.parameters())
        num_texts, carries_state = 2 if self._num_sink_tokens else 1, self._carries_state()  # a text for each view
        for count in range(self._start, num_tokens):
            length = count + 1 if carries_state else self._capacity
            if num_parameters * batch * num_texts * length * (count + 1 - self._start) > max_work:
                return count
        return num_tokens

    def attend(
        self, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any = None, **arguments: Any
    ) -> tuple[torch.Tensor, None]:
        """transformers' attention interface. q: [b, Hq, n, D], k and v: [b, Hkv, n, .] -> [b, n, Hq, Dv]."""
        if self._tried is not None:
            self._tried += [x[0, :, -1].double() for x in (q, k, v)]
            return own_values(q, v), None
        layer = layer_of(module)
        mask = with_indices(module, q, mask, arguments)
        given = call_arguments(layer, q, arguments)
        call, self._pass.call = self._pass.call, self._pass.call + 1
        if self._pass.rows is None:
            return self._attend_first(layer, given, q, k, v, mask), None
        if call == len(self._outputs):
            raise _refused("attention calls whose number changes from pass to pass", "the same in each")
        return self._attend_rows(call, self._pass.rows, given, q, k, v, mask), None

    def _attend_first(
        self, layer: int, given: CallArguments, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any
    ) -> torch.Tensor:
        """The first C tokens. Each sees all before it, or the sliding window of its layer."""
        num_tokens = q.shape[2]
        window = given.sliding_window if mask is None else visible_window(layer, mask, num_tokens)
        views = [self._view(size, window) for size in self._variant.windows(layer, k.shape[1], self._window_size)]
        behind = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
        seen = (behind >= 0) & (behind < (window or num_tokens))
        factors = self._factors(layer, views)
        streams = zip(q.split(1), k.split(1), v.split(1), strict=True)  # one after another: memory
        out = torch.cat([attended(given, *stream, behind, seen, factors) for stream in streams]).to(v.dtype)
        kept = out.new_zeros(max(self._num_tokens, num_tokens), self._batch, *out.shape[2:])
        kept[:num_tokens] = out.transpose(0, 1)
        self._outputs.append(kept)
        self._views.append(tuple(views))
        return out

    def _attend_rows(
        self,
        call: int,
        rows: list[dict[View, _Row]],
        given: CallArguments,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
    ) -> torch.Tensor:
        """The newest token of each row attends to what is cached; the others have the outputs that they had."""
        q, k, v = (x.unflatten(0, (-1, self._batch)) for x in (q, k, v))  # [R, B, H, n, .]
        outputs, group = self._outputs[call], q.shape[2] // k.shape[2]
        for i, (time, by_view) in enumerate(zip(self._pass.times, rows, strict=True)):
            for j, (view, row) in enumerate(by_view.items()):
                kv_heads = [head for head, one in enumerate(self._views[call]) if one == view]
                if not kv_heads:
                    continue
                r, n, cached = i * len(by_view) + j, row.newest, row.cached
                q_heads = [head * group + g for head in kv_heads for g in range(group)]
                if row.positions is None:
                    check_visible(given.layer, mask, r * self._batch, n, cached)
                # Of the sinks by place in the cache, of the window by tokens: both by index in the text of the cache.
                behind = torch.arange(len(cached) - 1, -1, -1)[None]
                heads = given.of_heads(q_heads)
                factors = self._factors(given.layer, [view])
                outputs[time][:, q_heads] = attended(
                    heads,
                    q[r][:, q_heads, n : n + 1],
                    k[r][:, kv_heads][:, :, cached],
                    v[r][:, kv_heads][:, :, cached],
                    behind,
                    torch.ones(1, len(cached), dtype=torch.bool),
                    None if factors is None else factors[q_heads],
                )[:, 0].to(outputs.dtype)
        tokens = torch.tensor([row.tokens for by_view in rows for row in by_view.values()])  # [R, n]
        return outputs[tokens].transpose(1, 2).flatten(0, 1).contiguous()  # [R * B, n, Hq, Dv]

    def _view(self, window_size: int, sliding_window: int | None) -> View:
        """Sinks and window that a head keeps where the model itself sees sliding_window tokens; None: all."""
        if sliding_window is not None and sliding_window < self._num_sink_tokens + window_size:
            return View(0, sliding_window)
        return View(self._num_sink_tokens, window_size)

    def _factors(self, layer: int, views: list[View]) -> torch.Tensor | None:
        """Logarithms, float64 [Hq], of the factors on token 0 in heads that keep it; None: there are none."""
        tuning = self._variant.sink_tuning
        if tuning is None or not all(view.num_sinks for view in views):
            return None
        return torch.tensor(tuning.first_token_scale[layer], dtype=torch.float64).log()

    def _row(self, time: int, view: View, num_tokens: int | None) -> _Row:
        """The text of a view at a time: of C tokens, or of the first num_tokens of the stream."""
        position = min(time, self._capacity - 1)  # of the newest, in the cache
        num_cached = min(time + 1, view.num_sinks + view.window)
        sinks = list(range(min(view.num_sinks, num_cached)))
        cached = sinks + list(range(time + 1 - num_cached + len(sinks), time + 1))
        before = position + 1 - num_cached  # a head that keeps fewer tokens has nothing at the first places
        if num_tokens is None:
            after = self._capacity - 1 - position
            return _Row([0] * before + cached + [0] * after, None, position, list(range(before, position + 1)))
        # Some recurrent layers begin anew at position 0, which the first token has and no other (RecurrentGemma).
        # Without sinks the oldest cached token would have it, too: all cached tokens stand one further then.
        further = int(not sinks and time > position)
        positions = [min(max(0, position - time + u), self._capacity - 1) + further for u in range(num_tokens)]
        positions[: len(sinks)] = range(before, before + len(sinks))
        positions = [0, *(max(1, place) for place in positions[1:])]
        return _Row(list(range(num_tokens)), positions, time, cached)

    def _first_tokens(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """Logits [B, vocab] of the first C tokens, and what calls there are."""
        self._pass = _Pass(range(self._capacity), None)
        logits = self._run(input_ids=ids[:, : self._capacity])
        return list(logits.unbind(dim=1))

    def _next_tokens(
        self, ids: torch.Tensor, times: range, views: list[View], carries_state: bool
    ) -> Iterator[torch.Tensor]:
        """Logits [B, vocab] of each of these times, whose earlier tokens have been fed."""
        num_tokens = max(times.stop, self._capacity) if carries_state else None
        rows = [{view: self._row(time, view, num_tokens) for view in views} for time in times]
        self._pass = _Pass(times, rows)
        flat = [row for by_view in rows for row in by_view.values()]
        given: dict[str, torch.Tensor] = {
            "input_ids": ids[:, torch.tensor([row.tokens for row in flat])].transpose(0, 1).flatten(0, 1)  # [R * B, n]
        }
        if num_tokens is not None:
            positions = torch.tensor([row.positions for row in flat])
            given["position_ids"] = positions.repeat_interleave(self._batch, dim=0)
            # Or transformers would take positions that are not in a row for several texts.
            given["attention_mask"] = torch.ones_like(given["input_ids"])
        newest = torch.tensor([row.newest for row in flat]).repeat_interleave(self._batch)
        with self._logits_of(newest):
            logits = self._run(**given)
        if logits.shape[1] != 1:
            logits = logits[torch.arange(len(newest)), newest][:, None]
        if self._pass.call != len(self._outputs):
            raise _refused("attention calls whose number changes from pass to pass", "the same in each")
        # Of each time one view: they differ by nothing but rounding.
        yield from logits[:, 0].unflatten(0, (len(times), len(views), self._batch))[:, 0]

    def _run(self, **given: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self._model(**given, use_cache=False).logits
        return logits

    @contextlib.contextmanager
    def _logits_of(self, newest: torch.Tensor) -> Iterator[None]:
        """Compute logits of the newest token of each row alone: vocabularies are large."""

        def take(_module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            x = arguments[0] if arguments else None
            if isinstance(x, torch.Tensor) and x.dim() == 3 and x.shape[0] == len(newest):
                return (x[torch.arange(len(newest)), newest][:, None], *arguments[1:])
            return None

        find = getattr(self._model, "get_output_embeddings", None)
        head = None if find is None else find()
        hook = None if head is None else head.register_forward_pre_hook(take)
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()

    def _carries_state(self) -> bool:
        """Whether a token depends on others though each attends to itself alone: something else carries a state."""
        found = []
        for first in (0, NUM_TRIED):
            ids = torch.arange(first, first + NUM_TRIED)
            ids[-1] = 2 * NUM_TRIED
            self._tried = []
            with random_embeddings(self._model, 2 * NUM_TRIED + 1):
                logits = self._run(input_ids=ids[None])
            found.append([*self._tried, logits[0, -1].double()])
            self._tried = None
        if len(found[0]) != len(found[1]):
            return True
        return not all(
            bool(((x - y).abs().max() <= IS_CHANGED * x.abs().max()) | ~x.isfinite().all())
            for x, y in zip(*found, strict=True)
        )


def _refused(received: str, expected: str) -> UsageError:
    return UsageError(
        problem("attention", received=received, expected=expected, fix="there is no streaming reference for this model")
    )
