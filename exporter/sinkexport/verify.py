"""Does a bundle compute what its model computes? Three comparisons of logits, token by token.

dense      against transformers' own forward pass over the whole text, before the first token is evicted.
streaming  against `sinkexport.reference`, which rotates every key anew in each step, over several wraps of the window.
prefill    the bundle against itself: pieces of odd lengths against one token at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from sinkrt.contract import Manifest, load_manifest
from sinkrt.errors import UsageError, problem
from sinkrt.session import Session
from sinkrt.text import Tokenizer

from sinkexport.machine import torch_threads
from sinkexport.progress import Report, silent
from sinkexport.reference import streaming_reference
from sinkexport.sources import LoadedModel, load_model

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
DEFAULT_TOLERANCE: Mapping[str, float] = {"float32": 1e-3, "float16": 0.25}
"""Largest error of a logit, as a share of the spread of its step's logits, by the bundle's weights_dtype.

Bundle and reference round differently (order of sums, fused operators). Measured over six wraps with W = 60: 4e-5 for
SmolLM2-135M in float32 and up to 2e-5 for tiny random models of every family; 8e-2 and 4e-2 in float16, which rounds
weights and large activations (the reference keeps both in float32). The tolerances leave room for larger models.
"""

TOLERANCE_PER_TOKEN = 2e-6
"""The same for each token of the cache's capacity, where that is more.

transformers multiplies position and frequency in float32, which near position C is wrong by up to C * 2^-24 radians,
in the dense model and in the reference alike; the bundle's own angles are exact. Measured for SmolLM2-135M with
W = 1020 over six wraps: 5e-4, of which 6e-5 is left if the reference's cos and sin are computed in float64.
"""

DEFAULT_WRAPS = 6
DEFAULT_DENSE_TOKENS = 256

BLOCK_TOKENS = 16
"""Steps that the bundle runs ahead of the reference."""


class Stream(Protocol):
    """What is asked of a `sinkrt.Session`."""

    def step(self, ids: Ids) -> Logits: ...
    def prefill(self, ids: Ids) -> Logits: ...
    def reset(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Logits of the bundle against others'.

    name: ``dense | streaming | prefill``. positions: how many were compared, in each stream.
    max_error: largest absolute difference of a logit. max_relative_error: the largest share of the spread (standard
    deviation over the vocabulary) of the same step's logits, at `worst_position`.
    top1_agreement: share of steps in which both put the same token first.
    failed_position: the first position above the tolerance, where the comparison stopped; None if there was none.
    """

    name: str
    positions: int
    max_error: float
    max_relative_error: float
    worst_position: int
    top1_agreement: float
    failed_position: int | None


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What `verify` found. num_tokens: tokens fed to each stream; tolerance: of `Comparison.max_relative_error`."""

    bundle: str
    model: str
    weights_dtype: str
    num_sink_tokens: int
    window_size: int
    batch: int
    ids: str
    num_tokens: int
    wraps: int
    tolerance: float
    comparisons: tuple[Comparison, ...]

    @property
    def failures(self) -> tuple[str, ...]:
        """One line for each comparison that failed."""
        return tuple(
            f"{c.name}: error {c.max_relative_error:.2e} of the logits' spread at position {c.failed_position}, "
            f"above the tolerance of {self.tolerance:.1e}"
            for c in self.comparisons
            if c.failed_position is not None
        )

    @property
    def passed(self) -> bool:
        """Whether every comparison stayed within the tolerance."""
        return not self.failures

    def to_json(self) -> str:
        """The report as JSON; a number that is not finite becomes null."""
        facts = {**dataclasses.asdict(self), "passed": self.passed, "failures": self.failures}
        facts["comparisons"] = [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in c.items()}
            for c in facts["comparisons"]
        ]
        return json.dumps(facts, indent=1) + "\n"


def verify(
    bundle: Path | str,
    source: str | LoadedModel,
    *,
    text: str | None = None,
    wraps: int = DEFAULT_WRAPS,
    tolerance: float | None = None,
    dense_tokens: int = DEFAULT_DENSE_TOKENS,
    seed: int = 0,
    backend: str = "ort",
    report: Report = silent,
) -> VerifyReport:
    """Compare the bundle with the model `source` (directory, ``.gguf`` file, Hub id, or one loaded in float32).

    text: what to stream, repeated if too short; None for random ids from `seed`.
    wraps: how often the window is overwritten whole, after it has filled. dense_tokens: positions compared with
    the dense model, at most C. tolerance: None for `default_tolerance`.
    The first position above the tolerance ends the run.

    Raises: UsageError for bad arguments, a model that is not the bundle's, or text and no tokenizer;
        BundleError for a broken bundle; BackendError.
    """
    _check_arguments(wraps, tolerance, dense_tokens)
    manifest = load_manifest(Path(bundle))
    if manifest.quantization is not None and tolerance is None:
        raise UsageError(problem("verify", received=f"a bundle quantised by '{manifest.quantization.recipe}'",
                                 expected="a tolerance that allows for it: rounding explains only so much",
                                 fix="pass --tolerance, or compare perplexities with 'sinkexport eval'"))  # fmt: skip
    tokens = None if text is None else _encode(Path(bundle), manifest, text)
    stream = manifest.stream
    num_tokens = stream.capacity + wraps * stream.window_size
    ids = _random_ids(manifest, num_tokens, seed) if tokens is None else _spread_text(tokens, stream.batch, num_tokens)
    limit = default_tolerance(manifest) if tolerance is None else tolerance
    report("load", 0, 1)
    with Session.load(bundle, backend, threads=_half_of_the_cores()) as session:  # first: it fails faster than a model
        loaded = load_model(source, "float32") if isinstance(source, str) else source
        check_same_model(manifest, loaded.model)
        report("load", 1, 1)
        comparisons = tuple(compare(session, loaded.model, manifest, ids, limit, dense_tokens, report))
    return VerifyReport(
        bundle=str(bundle),
        model=loaded.name,
        weights_dtype=manifest.weights_dtype,
        num_sink_tokens=stream.num_sink_tokens,
        window_size=stream.window_size,
        batch=stream.batch,
        ids=f"random, seed {seed}" if tokens is None else f"text of {len(tokens)} tokens",
        num_tokens=num_tokens,
        wraps=wraps,
        tolerance=limit,
        comparisons=comparisons,
    )


def default_tolerance(manifest: Manifest) -> float:
    """Largest `Comparison.max_relative_error` that rounding explains, for a bundle's precision and capacity."""
    return max(DEFAULT_TOLERANCE[manifest.weights_dtype], TOLERANCE_PER_TOKEN * manifest.stream.capacity)


def compare(
    session: Stream,
    model: Any,
    manifest: Manifest,
    ids: Ids,
    tolerance: float,
    dense_tokens: int,
    report: Report,
) -> Iterator[Comparison]:
    """The three comparisons over ids [B, N]; a failed one is the last.

    The dense and the streaming one share one pass of the bundle over the stream.
    """
    stream, num_tokens = manifest.stream, ids.shape[1]
    ends = _piece_ends(num_tokens, stream.capacity)
    dense_logits = _dense_logits(model, ids[:, : min(dense_tokens, stream.capacity)], report)  # [B, n, vocab]
    dense, streaming = _Tally("dense", tolerance), _Tally("streaming", tolerance)
    at_ends: dict[int, Logits] = {}
    with (
        streaming_reference(model, stream.num_sink_tokens, stream.window_size) as reference,
        torch_threads(_half_of_the_cores()),
        contextlib.closing(_steps_ahead(session, ids)) as steps,
    ):
        for t, got in enumerate(steps):
            if t + 1 in ends:
                at_ends[t + 1] = got
            if t < dense_logits.shape[1]:
                dense.add(t, got, dense_logits[:, t])
            streaming.add(t, got, reference.step(torch.from_numpy(ids[:, t])).float().numpy())
            report("stream", t + 1, num_tokens)
            if dense.failed or streaming.failed:
                break
    yield dense.result()
    yield streaming.result()
    if dense.failed or streaming.failed:
        return
    yield _compare_prefill(session, ids, at_ends, tolerance, report)


def _steps_ahead(session: Stream, ids: Ids) -> Generator[Logits, None, None]:
    """Logits [B, vocab] of each step of a stream from its start, computed a block ahead in a thread of its own."""
    session.reset()

    def block(start: int) -> list[Logits]:
        return [session.step(column).copy() for column in ids.T[start : start + BLOCK_TOKENS]]

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(block, 0)
        for start in range(0, ids.shape[1], BLOCK_TOKENS):
            ready = waiting.result()
            waiting = pool.submit(block, start + BLOCK_TOKENS)  # the last one is empty
            yield from ready


def _half_of_the_cores() -> int:
    """Bundle and reference run side by side. Given all cores each, their spinning threads would stop each other:
    several times slower than either alone."""
    return max(1, torch.get_num_threads() // 2)


def _compare_prefill(
    session: Stream, ids: Ids, at_ends: Mapping[int, Logits], tolerance: float, report: Report
) -> Comparison:
    """Feed the start of the stream again in pieces and compare the logits at their ends."""
    tally, start, total = _Tally("prefill", tolerance), 0, max(at_ends)
    session.reset()
    for end, want in sorted(at_ends.items()):
        tally.add(end - 1, session.prefill(ids[:, start:end]), want)
        report("prefill", end, total)
        start = end
        if tally.failed:
            break
    return tally.result()


def _piece_ends(num_tokens: int, capacity: int) -> frozenset[int]:
    """Where prefill pieces end: odd lengths before the window fills, one piece longer than the whole cache, and
    odd lengths again, over at most two caches and a bit."""
    lengths = [1, 2, 5, 3, 1, 7, capacity // 2 + 1, 1, capacity + 1, 4, 1, 9, capacity // 3 + 1]
    ends, end = set(), 0
    for length in lengths:
        end = min(end + length, num_tokens)
        ends.add(end)
    return frozenset(ends)


class _Tally:
    """Collects one comparison, step by step."""

    def __init__(self, name: str, tolerance: float) -> None:
        self._name = name
        self._tolerance = tolerance
        self._positions = 0
        self._agreed = 0.0
        self._max_error = 0.0
        self._worst = (0.0, 0)  # relative error, position
        self._failed: int | None = None

    @property
    def failed(self) -> bool:
        return self._failed is not None

    def add(self, position: int, got: Logits, want: Logits) -> None:
        """got, want: [B, vocab] of one position. What is not a number counts as an infinite error."""
        difference = np.abs(got.astype(np.float64) - want)  # [B, vocab]
        spread = np.maximum(want.std(axis=-1, keepdims=True, dtype=np.float64), 1e-9)  # [B, 1]
        error, relative = (float(x.max()) for x in (difference, difference / spread))
        if math.isnan(relative):
            error = relative = math.inf
        self._positions += 1
        self._agreed += float((got.argmax(axis=-1) == want.argmax(axis=-1)).mean())
        self._max_error = max(self._max_error, error)
        self._worst = max(self._worst, (relative, position), key=lambda worst: worst[0])
        if relative > self._tolerance and self._failed is None:
            self._failed = position

    def result(self) -> Comparison:
        return Comparison(
            name=self._name,
            positions=self._positions,
            max_error=self._max_error,
            max_relative_error=self._worst[0],
            worst_position=self._worst[1],
            top1_agreement=self._agreed / max(self._positions, 1),
            failed_position=self._failed,
        )


def _dense_logits(model: Any, ids: Ids, report: Report) -> Logits:
    """The model's own logits [B, n, vocab], with its default attention and no cache."""
    report("dense", 0, 1)
    with torch.no_grad():
        logits: Logits = model(input_ids=torch.from_numpy(ids), use_cache=False).logits.float().numpy()
    report("dense", 1, 1)
    return logits


def _random_ids(manifest: Manifest, num_tokens: int, seed: int) -> Ids:
    """int64 [B, num_tokens]."""
    shape = (manifest.stream.batch, num_tokens)
    return np.random.default_rng(seed).integers(0, manifest.model.vocab_size, shape)


def _spread_text(tokens: Ids, batch: int, num_tokens: int) -> Ids:
    """int64 [B, num_tokens]: each stream starts elsewhere in the text, which repeats if it is too short."""
    starts = np.arange(batch) * len(tokens) // batch
    ids: Ids = tokens[(starts[:, None] + np.arange(num_tokens)) % len(tokens)]
    return ids


def _encode(bundle: Path, manifest: Manifest, text: str) -> Ids:
    """int64 [n], n >= 1, by the bundle's tokenizer."""
    tokens = Tokenizer.load(bundle, manifest).encode(text)
    if not tokens:
        raise UsageError(problem("text", received="no tokens", expected="at least one", fix="pass a longer text"))
    return np.asarray(tokens, dtype=np.int64)


def _check_arguments(wraps: int, tolerance: float | None, dense_tokens: int) -> None:
    for name, value, low in (("wraps", wraps, 1), ("dense_tokens", dense_tokens, 1)):
        if value < low:
            raise UsageError(problem(name, received=value, expected=f">= {low}", fix="change it"))
    if tolerance is not None and not tolerance > 0:
        raise UsageError(problem("tolerance", received=tolerance, expected="> 0", fix="change it"))


def check_same_model(manifest: Manifest, model: Any) -> None:
    """Refuse a model that cannot be the bundle's: its logits could not even be compared."""
    config = model.config.get_text_config()
    facts = manifest.model
    for what, ours, theirs in (
        ("architecture", facts.architecture, type(model).__name__),
        ("layers", facts.num_layers, config.num_hidden_layers),
        ("hidden size", facts.hidden_size, config.hidden_size),
        ("query heads", facts.num_q_heads, config.num_attention_heads),
        ("vocabulary", facts.vocab_size, config.vocab_size),
    ):
        if ours != theirs:
            raise UsageError(
                problem(
                    f"model's {what}",
                    received=theirs,
                    expected=f"{ours}, as in the bundle of '{facts.name}'",
                    fix="pass the model that was exported",
                )
            )
