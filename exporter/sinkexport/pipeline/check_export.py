"""Comparison of a finished graph with its model, before the bundle gets its name.

A dozen tokens of some streams are fed to the bundle's own graphs, one by one and as a chunk. Their logits are compared
with those of transformers' own pass of the model. Tokens after the cache has filled are compared with references that
know nothing of how the graphs were made. Where it takes no more than a second or two, they are those of `verify`.
Otherwise both start from caches filled with random rows, as if the stream had run for long. That does not fit all
models: with others the streaming is done for as many tokens as a second allows.

A bundle whose window alone is INT8 has nearly the model's logits. One with quantised weights or inputs cannot have
them, nor one of experts, where rounding makes tokens choose others: there it is their correlation that counts.
Rounding leaves correlations near 0.9 in real models, a layer that is wrong or missing leaves little. A recipe that is
merely worse than its thresholds is not caught: `verify` with a text does that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sinkrt.backends.ort import available_bytes
from sinkrt.contract import RECURRENT_KINDS, SCALE_KINDS, Manifest
from sinkrt.errors import UsageError, problem
from sinkrt.session import Session

from sinkexport.evaluation.comparison import default_tolerance
from sinkexport.families import rotates_by_length
from sinkexport.families.adapters import has_alibi
from sinkexport.families.refusals import refusing
from sinkexport.model.experts import declared_experts, static_experts
from sinkexport.model.loop_experts import loop_experts
from sinkexport.reference.dense import dense_logits
from sinkexport.reference.mid_stream import logits_from, typical_sizes
from sinkexport.reference.streamed import CALL_FOLLOWING, Streamed, streamed_logits
from sinkexport.util.arrays import Ids, Logits
from sinkexport.variants.variant import AttentionVariant

NUM_TOKENS = 12
"""Positions that are compared from a stream's start on, and after the cache has filled."""

MAX_STREAMS = 2
"""Streams of a batch that are compared: the first and the last."""

MAX_STREAMED_TOKENS, MAX_STREAMED_WORK = 128, 3e9
"""Tokens, and parameters times tokens, up to which a step of the reference for each takes no more than a second or
two."""

MAX_FOLLOWED_WORK = 1e10
"""The same of the call-following reference, which has a pass of many tokens for each. It compares fewer then."""

MID_STREAM_TOLERANCE_PER_TOKEN, MAX_MID_STREAM_TOLERANCE = 1e-5, 0.25
"""Tolerance as `TOLERANCE_PER_TOKEN` of comparison.py, where all keys of a full cache are random.

Few tokens share the attention there, so that each angle's error shows. A missing shift or a token that should be gone
changes 0.1 and more. Measured: 3e-3 for SmolLM2-135M at position 2,061."""

INT8_WINDOW_TOLERANCE = 0.3
"""Largest error of a logit, as a share of the logits' spread, of a bundle whose window alone is INT8. Measured: 0.05
for SmolLM2-135M."""

MIN_CORRELATION = 0.6
"""Smallest correlation of a quantised bundle's logits with the model's, in the mean over positions.

Measured: 0.98 for SmolLM2-135M by int8-dynamic, 0.87 by int4-nearest. Tiny random models with INT4 weights have 0.82 to
0.99, single positions of an MoE down to 0.06. Unrelated logits have 0."""

MIN_HALF_CORRELATION = 0.95
"""The same of float16 from random caches. Measured: 0.995 for SmolLM2-135M, single logits off by 0.8 of
their spread."""


class UncheckedWarning(UserWarning):
    """A bundle was written that nothing was compared with, or not with full caches."""


def why_unchecked(manifest: Manifest) -> str | None:
    """Reason why a bundle cannot be compared on this machine; None: it can."""
    if manifest.has_tensorrt_plugin:
        return "they need the TensorRT plugin, which ONNX Runtime does not have: use 'sinkexport verify' on the GPU"
    if manifest.weights_bytes > (free := available_bytes()):
        return f"they take {manifest.weights_bytes / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
    return None


def check_export(bundle: Path, manifest: Manifest, model: Any) -> None:
    """Compare the graphs of `bundle`, which `why_unchecked` has nothing against, with the model in memory.

    Raises: UsageError if they differ by more than rounding explains; BundleError if ONNX Runtime refuses a graph.
    """
    with (
        refusing(model, "comparing the exported graph with it"),
        static_experts(model),
        Session.load(bundle, verify=False, repack_prefill=False) as session,
    ):
        check = _Check(session, model, manifest, AttentionVariant.of_bundle(bundle, manifest))
        check.start_of_streams()
        check.full_cache()


class _Check:
    """One bundle and its model."""

    def __init__(self, session: Session, model: Any, manifest: Manifest, variant: AttentionVariant) -> None:
        self._session, self._model, self._manifest, self._variant = session, model, manifest, variant
        batch = manifest.stream.batch
        self._streams = [0, batch - 1][: min(batch, MAX_STREAMS)]

    def start_of_streams(self) -> None:
        """Before the first token is evicted, a bundle equals the dense model."""
        stream = self._manifest.stream
        num_tokens = min(NUM_TOKENS, stream.num_sink_tokens + self._variant.shortest_window(stream.window_size))
        if rotates_by_length(self._model.config, stream.capacity):
            ids = self._ids(NUM_TOKENS)
            if self._can_stream(NUM_TOKENS):
                with self._streaming(ids) as streamed:
                    self._compare(ids, _last(streamed, 0))
            return  # the model would rotate a short text otherwise than a full cache
        ids = self._ids(num_tokens)
        wanted = dense_logits(self._model, ids[self._streams], self._variant, stream.num_sink_tokens)
        self._compare(ids, wanted)

    def full_cache(self) -> None:
        """After evictions."""
        capacity, is_mid_stream = self._manifest.stream.capacity, False
        ids = self._ids(capacity + NUM_TOKENS)
        with self._streaming(ids) as streamed:
            if streamed.reference == CALL_FOLLOWING or self._can_stream(ids.shape[1]):
                self._compare_full(ids, streamed)
            else:
                is_mid_stream = self._variant.is_plain and not self._is_rounded
        if is_mid_stream and not rotates_by_length(self._model.config, capacity) and not self.mid_stream():
            with self._streaming(ids, follow_calls=True) as streamed:
                self._compare_full(ids, streamed)

    def _compare_full(self, ids: Ids, streamed: Streamed) -> None:
        """Compare the logits of what is streamed of ids [B, N] after the cache has filled, if anything is."""
        capacity = self._manifest.stream.capacity
        if streamed.num_tokens > capacity:
            self._compare(ids[:, : streamed.num_tokens], _last(streamed, capacity))
            return
        warnings.warn(
            "the graphs were compared with the model before eviction only: more takes long, use 'sinkexport verify'",
            UncheckedWarning,
            stacklevel=2,
        )

    @contextlib.contextmanager
    def _streaming(self, ids: Ids, *, follow_calls: bool = False) -> Iterator[Streamed]:
        """Stream ids [B, N] through the model, those of the streams that count. follow_calls: see `streamed_logits`."""
        stream = self._manifest.stream
        geometry = stream.num_sink_tokens, stream.window_size
        tokens = torch.from_numpy(ids[self._streams])
        with streamed_logits(
            self._model, tokens, *geometry, self._variant, MAX_FOLLOWED_WORK, follow_calls=follow_calls
        ) as streamed:
            yield streamed

    @property
    def _is_rounded(self) -> bool:
        """Whether weights or inputs of matmuls are quantised, or the window of a model whose later sinks are scaled
        down once they have received much attention: rounding decides then which are.

        Random caches are nothing that such a model was made for: SmolLM2-135M by int8-dynamic is left with a
        correlation of 0.47 from there.
        """
        quantization = self._manifest.quantization
        if quantization is None:
            return False
        is_act = self._variant.act is not None and quantization.kv == "int8"
        return is_act or (quantization.weights, quantization.activations) != ("float", "float")

    @property
    def _chooses(self) -> bool:
        """Whether rounding may make tokens choose other experts, which changes single logits by any amount."""
        return self._manifest.quantization is not None and bool(
            declared_experts(self._model) or loop_experts(self._model)
        )

    def mid_stream(self) -> bool:
        """From caches of random rows, as large as the model's own, at a position where all of them are full.

        Returns: whether that fits the model; nothing was compared otherwise.
        """
        stream, session = self._streams[-1], self._session
        num_tokens = 1 if has_alibi(self._model) else NUM_TOKENS
        ids = self._ids(NUM_TOKENS)[stream : stream + 1, :num_tokens]
        sizes = typical_sizes(self._model, torch.from_numpy(ids))
        kept = {(state.layer, state.kind) for state in self._manifest.states}
        if not {(layer, kind) for layer in sizes for kind in ("window_k", "window_v")} <= kept:
            return False  # layers that share a cache, or whose values are a part of their keys
        states = self._random_states(sizes)
        position = self._manifest.stream.capacity + NUM_TOKENS // 2
        tolerance = min(MID_STREAM_TOLERANCE_PER_TOKEN * position, MAX_MID_STREAM_TOLERANCE)
        start = dataclasses.replace(session.copy_stream(stream), states=states, position=position)
        dtype = next(self._model.parameters()).dtype
        layers = {layer: {kind: x.to(dtype) for kind, x in one.items()} for layer, one in self._rows(states).items()}
        try:
            with refusing(self._model, "running it on random caches"):
                wanted = logits_from(self._model, torch.from_numpy(ids), position, layers).float().numpy()
        except UsageError:
            return False
        session.place_stream(stream, start)
        stepped = np.stack([session.step(ids[:, i], [stream])[stream].copy() for i in range(num_tokens)])[None]
        # From such caches float16 is as far from float16 added in another order as a recipe is from its model.
        loosely = self._manifest.weights_dtype == "float16"
        self._judge(stepped, wanted, position, "step by step", tolerance, loosely=loosely)
        session.place_stream(stream, start)
        chunked = session.prefill(ids, streams=[stream])[stream][None, None]
        self._judge(
            chunked,
            wanted[:, -1:],
            position + num_tokens - 1,
            "as a chunk",
            tolerance,
            stepped[:, -1:],
            loosely=loosely,
        )
        return True

    def _random_states(self, sizes: dict[int, tuple[float, float]]) -> dict[str, np.ndarray]:
        """States of one stream by input name; those of recurrent layers as they begin."""
        random, states = np.random.default_rng(1), {}
        for state in self._manifest.states:
            shape, size = state.shape[1:], sizes[state.layer]["_v" in state.kind] if state.layer in sizes else 0.0
            if state.kind in RECURRENT_KINDS:
                values = np.zeros(shape)
            elif state.kind in SCALE_KINDS:
                values = np.full(shape, max(size, 1e-3) * 3 / 127)
            elif state.dtype == "int8":
                values = np.clip(np.rint(random.standard_normal(shape) * 127 / 3), -127, 127)
            else:
                values = random.standard_normal(shape) * size
            states[state.input] = values.astype(state.dtype)
        return states

    def _rows(self, states: dict[str, np.ndarray]) -> dict[int, dict[str, torch.Tensor]]:
        """Keys and values [1, Hkv, S or W, D] by layer and kind, float32."""
        found: dict[int, dict[str, torch.Tensor]] = {}
        for state in self._manifest.states:
            found.setdefault(state.layer, {})[state.kind] = torch.from_numpy(states[state.input])[None].float()
        for one in found.values():
            for kind in SCALE_KINDS:
                if kind in one:
                    one[kind.removesuffix("_scale")] *= one[kind][..., None]
        return found

    def _can_stream(self, num_tokens: int) -> bool:
        work = float(self._manifest.model.num_parameters) * num_tokens
        return num_tokens <= MAX_STREAMED_TOKENS and work <= MAX_STREAMED_WORK

    def _ids(self, num_tokens: int) -> Ids:
        """int64 [B, num_tokens], which the model and the bundle both have."""
        embedding = self._model.get_input_embeddings() if hasattr(self._model, "get_input_embeddings") else None
        known = getattr(embedding, "num_embeddings", self._manifest.model.vocab_size)
        vocab_size = min(known, self._manifest.model.vocab_size)
        return np.random.default_rng(0).integers(0, vocab_size, (self._manifest.stream.batch, num_tokens))

    def _compare(self, ids: Ids, wanted: Logits) -> None:
        """wanted: [b, n, vocab] of the last n tokens of ids [B, N]: of steps, and of all of them as chunks."""
        session, start = self._session, ids.shape[1] - wanted.shape[1]
        session.reset()
        if start:
            session.prefill(ids[:, :start])
        stepped = np.stack([session.step(column).copy() for column in ids[:, start:].T], axis=1)[self._streams]
        self._judge(stepped, wanted, start, "step by step")
        session.reset()
        chunked = session.prefill(ids)[self._streams][:, None]
        self._judge(chunked, wanted[:, -1:], ids.shape[1] - 1, "as a chunk", stepped=stepped[:, -1:])

    def _judge(
        self,
        got: Logits,
        wanted: Logits,
        start: int,
        how: str,
        tolerance: float = 0.0,
        stepped: Logits | None = None,
        *,
        loosely: bool = False,
    ) -> None:
        """got, wanted: [b, n, vocab] from position `start` on. tolerance: more than `default_tolerance`, or not.
        stepped: what the bundle's own steps gave, which a quantised chunk may be like instead: at a single position a
        rounded model may be far from its own. loosely: by correlation, as quantised bundles are.

        Raises: UsageError.
        """
        got, wanted = got.astype(np.float64), wanted.astype(np.float64)
        limit: float
        quantization = self._manifest.quantization
        if not loosely and not self._is_rounded and not self._chooses:
            spread = np.maximum(wanted.std(axis=-1, keepdims=True), 1e-9)
            errors = (np.abs(got - wanted) / spread).max(axis=(0, 2))  # [n]
            worst = int(np.argmax(np.nan_to_num(errors, nan=np.inf)))
            rounded = 0.0 if quantization is None else INT8_WINDOW_TOLERANCE
            limit = max(default_tolerance(self._manifest), tolerance, rounded)
            is_right = bool((errors <= limit).all())
            found = f"logits that differ by {errors[worst]:.1e} of their spread at position {start + worst}, fed {how}"
            expected = f"at most {limit:.1e}, which rounding explains"
            fix = "this model cannot be exported exactly" if quantization is None else "use --kv fp"
        else:
            found_each, limit = correlations(got, wanted), MIN_HALF_CORRELATION if loosely else MIN_CORRELATION
            if stepped is not None:
                found_each = np.maximum(found_each, correlations(got, stepped.astype(np.float64)))
            found_mean = float(found_each.mean())
            is_right = found_mean >= limit
            found = f"logits whose correlation with the model's is {found_mean:.2f}, fed {how}"
            rounds = "float16" if quantization is None else f"the recipe '{quantization.recipe}'"
            expected = f"at least {limit}, whatever {rounds} rounds"
            fix = (
                "use --dtype fp32"
                if quantization is None
                else ("choose a finer recipe; without a recipe this model is exported as it is, or refused")
            )
        if not is_right:
            raise UsageError(
                problem("the exported graph differs from the model", received=found, expected=expected, fix=fix)
            )


def _last(streamed: Streamed, first: int) -> Logits:
    """[b, n, vocab], from token `first` on."""
    wanted = [logits.float().numpy() for t, logits in enumerate(streamed.logits) if t >= first]
    return np.stack(wanted, axis=1)


def correlations(got: Logits, wanted: Logits) -> Logits:
    """[.., vocab] twice -> [..], Pearson's; 0 where one is constant, NaN where one is not finite."""
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (got, wanted))
    size = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    found: Logits = (a * b).sum(axis=-1) / np.maximum(size, 1e-30)
    return found
