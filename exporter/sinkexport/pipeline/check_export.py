"""Comparison of a finished graph with its model, before the bundle gets its name.

A dozen tokens of some streams are fed to the bundle's own graphs, one by one and as chunks, each where the other has
left rows in the caches. Their logits are compared with those of transformers' own pass of the model. Tokens after the
cache has filled are compared with references that know nothing of how the graphs were made. Where it takes no more than
a second or two, they are those of `verify`. Otherwise both start from caches filled with random rows, as if the stream
had run for long, and go past the end of the window's ring. That does not fit all models: with others the streaming is
done for as many tokens as a second allows.

ONNX Runtime opens the graphs beside the model's first passes.

A bundle whose window alone is INT8 has nearly the model's logits, or those of a reference that rounds as it does. One
with quantised weights or inputs cannot have them, nor one of experts, where rounding makes tokens choose others: there
it is their correlation that counts. Rounding leaves correlations near 0.9 in real models, a layer that is wrong or
missing leaves little. A recipe that is merely worse than its thresholds is not caught: `verify` with a text does that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sinkrt.backends.ort import available_bytes
from sinkrt.contract import Manifest
from sinkrt.errors import UsageError
from sinkrt.graph_runner import smallest_chunk
from sinkrt.session import Session, StreamCopy

from sinkexport.families import rotates_by_length
from sinkexport.families.adapters import has_alibi
from sinkexport.families.refusals import refusing
from sinkexport.model.experts import static_experts
from sinkexport.pipeline.judge import Judge
from sinkexport.pipeline.random_caches import random_states, rows_of
from sinkexport.reference.dense import dense_logits
from sinkexport.reference.mid_stream import logits_from, typical_sizes
from sinkexport.reference.streamed import CALL_FOLLOWING, Streamed, logits_of_int8_window, streamed_logits
from sinkexport.util.arrays import Ids, Logits
from sinkexport.variants.variant import AttentionVariant

NUM_TOKENS = 12
"""Positions that are compared from a stream's start on, and after the cache has filled."""

MIN_CHUNK = 8
"""Tokens of a chunk, unless the runtime feeds as many step by step."""

STEPS_AROUND_WRAP, STEPS_AFTER_CHUNK = 4, 2
"""Steps from a full cache on, half of them past the end of the ring, and steps that read what a chunk wrote."""

MAX_STREAMS = 2
"""Streams of a batch that are compared: the first and the last."""

MAX_STREAMED_TOKENS, MAX_STREAMED_WORK = 128, 3e9
"""Tokens, and parameters times tokens, up to which a step of the reference for each takes no more than a second or
two."""

MAX_FOLLOWED_WORK = 1e10
"""The same of the call-following reference, which has a pass of many tokens for each. It compares fewer then."""

MID_STREAM_TOLERANCE_PER_TOKEN, MAX_MID_STREAM_TOLERANCE = 5e-6, 0.25
"""Tolerance as `TOLERANCE_PER_TOKEN` of comparison.py, where all keys of a full cache are random.

Few tokens share the attention there, so that each angle's error shows. A missing shift or a token that should be gone
changes 0.1 and more. Measured: 3e-3 for SmolLM2-135M at position 2,061."""


class UncheckedWarning(UserWarning):
    """A bundle was written that nothing was compared with, or not with full caches."""


def why_unchecked(manifest: Manifest) -> str | None:
    """Reason why a bundle cannot be compared on this machine; None: it can."""
    if manifest.has_tensorrt_plugin:
        return "they need the TensorRT plugin, which ONNX Runtime does not have: use 'sinkexport verify' on the GPU"
    # Float32 weights are pages of their file. Of float16 each graph gets copies in float32, which a CPU computes in.
    is_half = manifest.weights_dtype == "float16" and manifest.quantization is None
    needed = manifest.weights_bytes * (2 * len(manifest.graphs) if is_half else 1)
    if needed > (free := available_bytes()):
        return f"they take {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
    return None


def check_export(bundle: Path, manifest: Manifest, model: Any) -> None:
    """Compare the graphs of `bundle`, which `why_unchecked` has nothing against, with the model in memory.

    Raises: UsageError if they differ by more than rounding explains; BundleError if ONNX Runtime refuses a graph.
    """
    with opened(bundle, manifest) as session:
        compare_graphs(session, bundle, manifest, model)


def compare_graphs(session: Callable[[], Session], bundle: Path, manifest: Manifest, model: Any) -> None:
    """Do what `check_export` does. session: as `opened` gives it.

    Raises: as `check_export`.
    """
    with refusing(model, "comparing the exported graph with it"), static_experts(model):
        check = _Check(session, model, manifest, AttentionVariant.of_bundle(bundle, manifest))
        check.start_of_streams()
        check.full_cache()
        check.drafts()


@contextlib.contextmanager
def opened(bundle: Path, manifest: Manifest) -> Iterator[Callable[[], Session]]:
    """Open a bundle beside what is done inside. Yields: waits for the session, and gives it.

    Matmuls of floating-point weights read the pages of the file: a copy in another layout would only be faster.
    """
    is_float = manifest.quantization is None or manifest.quantization.weights == "float"
    load = functools.partial(Session.load, bundle, verify=False, repack_prefill=False, repack_decode=not is_float)
    with ThreadPoolExecutor(max_workers=1) as pool:
        opening = pool.submit(load)
        try:
            yield opening.result
            opening.result()  # though nothing was run
        finally:
            if opening.exception() is None:
                opening.result().close()


class _Check:
    """One bundle and its model."""

    def __init__(
        self, session: Callable[[], Session], model: Any, manifest: Manifest, variant: AttentionVariant
    ) -> None:
        self._opened, self._model, self._manifest, self._variant = session, model, manifest, variant
        self._judge = Judge(model, manifest, variant)
        batch = manifest.stream.batch
        self._streams = [0, batch - 1][: min(batch, MAX_STREAMS)]

    @property
    def _session(self) -> Session:
        return self._opened()

    @property
    def _chunk(self) -> int:
        """Tokens of a chunk that is compared; 0 if the bundle has no graph for chunks."""
        chunk_size = self._manifest.stream.chunk_size
        return (
            0 if chunk_size == 1 else min(chunk_size, max(smallest_chunk(chunk_size, self._manifest.target), MIN_CHUNK))
        )

    def start_of_streams(self) -> None:
        """Before the first token is evicted, a bundle equals the dense model."""
        stream = self._manifest.stream
        if rotates_by_length(self._model.config, stream.capacity):
            ids = self._ids(max(NUM_TOKENS, self._chunk))
            if self._can_stream(ids.shape[1]):
                with self._streaming(ids) as streamed:
                    self._compare(ids, _last(streamed, 0))
            return  # the model would rotate a short text otherwise than a full cache
        is_loose, chunk = self._judge.is_loose, self._chunk
        past_sinks = min(stream.num_sink_tokens + 2, NUM_TOKENS)
        num_tokens = max(NUM_TOKENS, chunk) if is_loose or not chunk else past_sinks + chunk + 1
        num_tokens = min(num_tokens, stream.num_sink_tokens + self._variant.shortest_window(stream.window_size))
        ids = self._ids(num_tokens)
        wanted = dense_logits(self._model, ids[self._streams], self._variant, stream.num_sink_tokens)
        if is_loose or not chunk:
            self._compare_rounded(self._compare, ids, wanted)
            return

        def in_calls(ids: Ids, wanted: Logits) -> None:
            for plan in ((1,) * past_sinks + (chunk, 1), (chunk, 1)):
                self._session.reset()
                self._compare_each(ids, wanted, 0, plan)

        self._compare_rounded(in_calls, ids, wanted)

    def full_cache(self) -> None:
        """After evictions."""
        ids = self._ids(self._manifest.stream.capacity + NUM_TOKENS)
        may_be_mid_stream = (
            self._variant.is_plain
            and not self._judge.is_rounded
            and not self._can_stream(ids.shape[1])
            and not rotates_by_length(self._model.config, self._manifest.stream.capacity)
        )
        found = None
        if may_be_mid_stream:
            try:
                if self.mid_stream():
                    return
            except UsageError as error:  # a fault, unless the reference cannot follow this model
                found = error
        with self._streaming(ids) as streamed:
            can_follow = streamed.reference != CALL_FOLLOWING
            if found is not None and can_follow:
                raise found
            is_enough = not can_follow or self._can_stream(ids.shape[1])
            wanted = self._evicted(streamed) if is_enough else None
        if not is_enough and may_be_mid_stream:
            with self._streaming(ids, follow_calls=True) as streamed:
                wanted = self._evicted(streamed)
        if wanted is not None:
            num_tokens = self._manifest.stream.capacity + wanted.shape[1]
            self._compare_rounded(self._compare, ids[:, :num_tokens], wanted)
            return
        if not is_enough and not may_be_mid_stream:
            return
        warnings.warn(
            "the graphs were compared with the model before eviction only: more takes long, use 'sinkexport verify'",
            UncheckedWarning,
            stacklevel=2,
        )

    def drafts(self) -> None:
        """Drafted tokens have the logits that steps give: where the stream stands, and as its first tokens."""
        num_tokens = self._manifest.num_drafts + 1
        if num_tokens == 1:
            return
        session, ids = self._session, self._ids(num_tokens)
        for _ in range(2):
            copies, position = [session.copy_stream(i) for i in range(session.batch)], int(session.position[0])
            stepped = np.stack([session.step(column).copy() for column in ids.T], axis=1)
            for i, copy in enumerate(copies):
                session.place_stream(i, copy)
            verified = session.verify(ids)
            if self._judge.is_loose:
                self._judge.correlation(verified, stepped, "as a draft")
            else:
                tolerance = min(MID_STREAM_TOLERANCE_PER_TOKEN * position, MAX_MID_STREAM_TOLERANCE)
                self._judge.errors(verified, stepped, position, "as a draft", tolerance)
            session.reset()

    def _evicted(self, streamed: Streamed) -> Logits | None:
        """Logits of what is streamed after the cache has filled; None: nothing is."""
        capacity = self._manifest.stream.capacity
        return _last(streamed, capacity) if streamed.num_tokens > capacity else None

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

    def mid_stream(self) -> bool:
        """From caches of random rows, as large as the model's own, at a position where all of them are full.

        The tokens go past the end of the window's ring.
        Returns: whether that fits the model; nothing was compared otherwise.

        Raises: UsageError if the graphs differ from the model.
        """
        # From such caches float16 is as far from float16 added in another order as a recipe is from its model.
        is_half, chunk = self._manifest.weights_dtype == "float16", self._chunk
        is_loose = self._judge.is_loose or is_half
        num_tokens = 1 if has_alibi(self._model) else max(NUM_TOKENS, chunk + STEPS_AFTER_CHUNK)
        ids = self._ids(num_tokens)[self._streams[-1] :][:1]
        sizes = typical_sizes(self._model, torch.from_numpy(ids[:, :NUM_TOKENS]))
        kept = {(state.layer, state.kind) for state in self._manifest.states}
        if not {(layer, kind) for layer in sizes for kind in ("window_k", "window_v")} <= kept:
            return False  # layers that share a cache, or whose values are a part of their keys
        states = random_states(self._manifest, sizes)
        stream = self._manifest.stream
        position = stream.capacity + max(stream.window_size - STEPS_AROUND_WRAP // 2, 0)
        tolerance = min(MID_STREAM_TOLERANCE_PER_TOKEN * position, MAX_MID_STREAM_TOLERANCE)
        dtype = next(self._model.parameters()).dtype
        layers = {
            layer: {kind: x.to(dtype) for kind, x in one.items()}
            for layer, one in rows_of(self._manifest, states).items()
        }
        try:
            with refusing(self._model, "running it on random caches"):
                wanted = logits_from(self._model, torch.from_numpy(ids), position, layers).float().numpy()
        except UsageError:
            return False
        last = self._streams[-1]
        start = dataclasses.replace(self._session.copy_stream(last), states=states, position=position)
        if is_loose:
            self._compare_from(start, ids, wanted, is_half=is_half)
            return True
        plans = [(1,) * STEPS_AROUND_WRAP]
        if chunk:
            plans.append((min(chunk, num_tokens), *(1,) * STEPS_AFTER_CHUNK))
        for plan in plans:
            self._session.place_stream(last, start)
            self._compare_each(ids, wanted, position, plan, [last], tolerance)
        return True

    def _compare_from(self, start: StreamCopy, ids: Ids, wanted: Logits, *, is_half: bool) -> None:
        """wanted: [1, n, vocab] of ids [1, n] from the stream `start` on: of steps, and of all of them as a chunk."""
        session, stream = self._session, self._streams[-1]
        session.place_stream(stream, start)
        stepped = np.stack([session.step(column, [stream])[stream].copy() for column in ids.T])[None]
        self._judge.correlation(stepped, wanted, "step by step", is_half=is_half)
        session.place_stream(stream, start)
        chunked = session.prefill(ids, streams=[stream])[stream][None, None]
        self._judge.correlation(chunked, wanted[:, -1:], "as a chunk", stepped[:, -1:], is_half=is_half)

    def _can_stream(self, num_tokens: int) -> bool:
        work = float(self._manifest.model.num_parameters) * num_tokens
        return num_tokens <= MAX_STREAMED_TOKENS and work <= MAX_STREAMED_WORK

    def _ids(self, num_tokens: int) -> Ids:
        """int64 [B, num_tokens], which the model and the bundle both have."""
        embedding = self._model.get_input_embeddings() if hasattr(self._model, "get_input_embeddings") else None
        known = getattr(embedding, "num_embeddings", self._manifest.model.vocab_size)
        vocab_size = min(known, self._manifest.model.vocab_size)
        return np.random.default_rng(0).integers(0, vocab_size, (self._manifest.stream.batch, num_tokens))

    def _compare_each(
        self,
        ids: Ids,
        wanted: Logits,
        position: int,
        plan: Sequence[int],
        streams: Sequence[int] | None = None,
        tolerance: float = 0.0,
    ) -> None:
        """Feed ids [b, n] in calls of as many tokens as `plan` says, and compare the last logits of each.

        wanted: [b, n, vocab], the first at `position`. streams: of the rows of ids; None: of all, and `wanted` has
        those that count. tolerance: as of `Judge.errors`. What there are no ids for is left out.
        """
        done = 0
        for size in plan:
            columns = ids[:, done : done + size]
            done += size
            if done > ids.shape[1]:
                break
            if size == 1:
                logits = self._session.step(columns[:, 0], streams)
            else:
                logits = self._session.prefill(columns, streams=streams)
            how = "step by step" if size == 1 else "as a chunk"
            got = logits[list(streams or self._streams)][:, None]
            self._judge.errors(got, wanted[:, done - 1 : done], position + done - 1, how, tolerance)

    def _compare_rounded(self, compare: Callable[[Ids, Logits], None], ids: Ids, wanted: Logits) -> None:
        """Compare with `wanted`; where an INT8 window is too far from it, with a reference that rounds in the same way.

        Recurrent states and experts amplify rounding in some models: a correct graph may be any distance from the model
        without it. compare, ids, wanted: as `_compare`.
        """
        try:
            compare(ids, wanted)
        except UsageError as error:
            if self._manifest.quantization is None or self._judge.is_loose:
                raise
            stream, tokens = self._manifest.stream, torch.from_numpy(ids[self._streams])
            geometry = stream.num_sink_tokens, stream.window_size
            rounded = logits_of_int8_window(self._model, tokens, *geometry, self._variant)
            if rounded is None:
                raise error
            compare(ids, rounded[:, -wanted.shape[1] :])

    def _compare(self, ids: Ids, wanted: Logits) -> None:
        """wanted: [b, n, vocab] of the last n tokens of ids [B, N]: of steps, and of all of them as chunks."""
        session, start = self._session, ids.shape[1] - wanted.shape[1]
        session.reset()
        if start:
            session.prefill(ids[:, :start])
        stepped = np.stack([session.step(column).copy() for column in ids[:, start:].T], axis=1)[self._streams]
        session.reset()
        chunked = session.prefill(ids)[self._streams][:, None]
        if self._judge.is_loose:
            self._judge.correlation(stepped, wanted, "step by step")
            self._judge.correlation(chunked, wanted[:, -1:], "as a chunk", stepped[:, -1:])
        else:
            self._judge.errors(stepped, wanted, start, "step by step")
            self._judge.errors(chunked, wanted[:, -1:], ids.shape[1] - 1, "as a chunk")


def _last(streamed: Streamed, first: int) -> Logits:
    """[b, n, vocab], from token `first` on."""
    wanted = [logits.float().numpy() for t, logits in enumerate(streamed.logits) if t >= first]
    return np.stack(wanted, axis=1)
