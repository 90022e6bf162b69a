"""Parity of a bundle with its model: three comparisons of logits, token by token.

dense      with transformers' own forward pass over the whole text, before the first token is evicted.
streaming  with `sinkexport.reference.streaming`, which rotates every key anew in each step, over several wraps of the
           window; where that cannot follow a model, with `sinkexport.reference.calls`.
prefill    of the bundle with itself: pieces of odd lengths against one token at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sinkrt.backends import BACKENDS
from sinkrt.contract import Manifest, load_manifest
from sinkrt.errors import UsageError, problem
from sinkrt.session import Session
from sinkrt.text import Tokenizer

from sinkexport.bench.machine import torch_threads
from sinkexport.evaluation.comparison import (
    Comparison,
    Stream,
    Tally,
    compare_prefill,
    default_tolerance,
    piece_ends,
)
from sinkexport.evaluation.defaults import VERIFY_DENSE_TOKENS, VERIFY_WRAPS
from sinkexport.families import rotates_by_length
from sinkexport.reference.dense import dense_logits
from sinkexport.reference.streamed import streamed_logits
from sinkexport.sources import LoadedModel, load_model
from sinkexport.util.arrays import Ids, Logits
from sinkexport.util.progress import Report, silent
from sinkexport.variants.variant import PLAIN, AttentionVariant

MAX_TOKENS = 10**8
"""Tokens of one verification: more than a machine processes in a month."""

MAX_FOLLOWED_WORK = 5e13
"""Parameters times tokens that the call-following reference computes: half an hour, as a stream of a large model takes.
It compares fewer tokens then."""

BLOCK_TOKENS = 16
"""Steps that the bundle runs ahead of the reference."""


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """Result of `verify`. num_tokens: fed to each stream. tolerance: of `Comparison.max_relative_error`."""

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
    def remarks(self) -> tuple[str, ...]:
        """One line for each comparison that stopped before the stream's end without a failure."""
        return tuple(
            f"{c.name}: {c.positions:,} of {self.num_tokens:,} tokens, as many as the {c.reference} reference can take"
            for c in self.comparisons
            if c.reference is not None and c.failed_position is None and c.positions < self.num_tokens and self.passed
        )

    @property
    def passed(self) -> bool:
        """Whether every comparison stayed within the tolerance."""
        return not self.failures

    def to_json(self) -> str:
        """Write the report as JSON; a number that is not finite becomes null."""
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
    wraps: int = VERIFY_WRAPS,
    tolerance: float | None = None,
    dense_tokens: int = VERIFY_DENSE_TOKENS,
    seed: int = 0,
    backend: str = BACKENDS[0],
    report: Report = silent,
) -> ParityReport:
    """Compare the bundle with the model `source` (directory, ``.gguf`` file, Hub id, or one loaded in float32).

    text: what to stream, repeated if too short; None for random ids from `seed`.
    wraps: how often the whole window is overwritten after it has filled.
    dense_tokens: positions compared with the dense model, at most C. tolerance: None for `default_tolerance`.
    The first position above the tolerance ends the run.

    Raises: UsageError for bad arguments, a model that is not the bundle's, or text and no tokenizer;
        BundleError for a broken bundle; BackendError.
    """
    manifest = load_manifest(Path(bundle))
    stream = manifest.stream
    num_tokens = stream.capacity + wraps * stream.window_size
    _check_arguments(manifest, wraps, num_tokens, tolerance, dense_tokens)
    tokens = None if text is None else _encode(Path(bundle), manifest, text)
    ids = _random_ids(manifest, num_tokens, seed) if tokens is None else _spread_text(tokens, stream.batch, num_tokens)
    limit = default_tolerance(manifest) if tolerance is None else tolerance
    report("load", 0, 1)
    with Session.load(bundle, backend, threads=_half_of_the_cores()) as session:  # first: it fails faster than a model
        loaded = load_model(source, "float32") if isinstance(source, str) else source
        check_same_model(manifest, loaded.model)
        report("load", 1, 1)
        variant = AttentionVariant.of_bundle(Path(bundle), manifest)
        comparisons = tuple(compare(session, loaded.model, manifest, ids, limit, dense_tokens, report, variant))
    return ParityReport(
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


def compare(
    session: Stream,
    model: Any,
    manifest: Manifest,
    ids: Ids,
    tolerance: float,
    dense_tokens: int,
    report: Report,
    variant: AttentionVariant = PLAIN,
    max_work: float = MAX_FOLLOWED_WORK,
) -> Iterator[Comparison]:
    """Run the three comparisons over ids [B, N]; a failed one is the last. variant: of the bundle.

    max_work: of `streamed_logits`.

    ``dense`` and ``streaming`` share one pass of the bundle over the stream.
    """
    stream, num_tokens = manifest.stream, ids.shape[1]
    ends = piece_ends(num_tokens, stream.capacity)
    if rotates_by_length(model.config, stream.capacity):
        dense_tokens = stream.capacity  # a shorter text would be rotated otherwise
    dense_tokens = min(dense_tokens, stream.num_sink_tokens + variant.shortest_window(stream.window_size))
    report("dense", 0, 1)
    first = ids[:, : min(dense_tokens, stream.capacity)]
    wanted = dense_logits(model, first, variant, stream.num_sink_tokens)  # [B, n, vocab]
    report("dense", 1, 1)
    dense, streaming = Tally("dense", tolerance), Tally("streaming", tolerance)
    at_ends: dict[int, Logits] = {}
    tokens = torch.from_numpy(ids)
    with (
        streamed_logits(model, tokens, stream.num_sink_tokens, stream.window_size, variant, max_work) as streamed,
        torch_threads(_half_of_the_cores()),
        contextlib.closing(_steps_ahead(session, ids)) as steps,
    ):
        for t, got in enumerate(steps):
            if t + 1 in ends:
                at_ends[t + 1] = got
            if t < wanted.shape[1]:
                dense.add(t, got, wanted[:, t])
            if t < streamed.num_tokens:
                streaming.add(t, got, next(streamed.logits).float().numpy())
            report("stream", t + 1, num_tokens)
            if dense.failed or streaming.failed:
                break
    yield dense.result()
    yield dataclasses.replace(streaming.result(), reference=streamed.reference)
    if dense.failed or streaming.failed:
        return
    yield compare_prefill(session, ids, at_ends, tolerance, report)


def _steps_ahead(session: Stream, ids: Ids) -> Generator[Logits, None, None]:
    """Yield logits [B, vocab] of each step of a stream from its start, computed a block ahead in another thread."""
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
    """Half of torch's threads, for the bundle and for the reference, which run at the same time.

    With all cores each, their spinning threads would stop each other: several times slower than either alone.
    """
    return max(1, torch.get_num_threads() // 2)


def _random_ids(manifest: Manifest, num_tokens: int, seed: int) -> Ids:
    """Draw random ids. Returns: int64 [B, num_tokens]."""
    shape = (manifest.stream.batch, num_tokens)
    return np.random.default_rng(seed).integers(0, manifest.model.vocab_size, shape)


def _spread_text(tokens: Ids, batch: int, num_tokens: int) -> Ids:
    """Spread a text, repeated if too short, over streams that start apart in it. Returns: int64 [B, num_tokens]."""
    starts = np.arange(batch) * len(tokens) // batch
    ids: Ids = tokens[(starts[:, None] + np.arange(num_tokens)) % len(tokens)]
    return ids


def _encode(bundle: Path, manifest: Manifest, text: str) -> Ids:
    """Encode a text with the bundle's tokenizer. Returns: int64 [n], n >= 1."""
    tokens = Tokenizer.load(bundle, manifest).encode(text)
    if not tokens:
        raise UsageError(problem("text", received="no tokens", expected="at least one", fix="pass a longer text"))
    return np.asarray(tokens, dtype=np.int64)


def _check_arguments(
    manifest: Manifest, wraps: int, num_tokens: int, tolerance: float | None, dense_tokens: int
) -> None:
    for name, value, low in (("wraps", wraps, 1), ("dense_tokens", dense_tokens, 1)):
        if value < low:
            raise UsageError(problem(name, received=value, expected=f">= {low}", fix="change it"))
    if tolerance is not None and not tolerance > 0:
        raise UsageError(problem("tolerance", received=tolerance, expected="> 0", fix="change it"))
    if manifest.quantization is not None and tolerance is None:
        raise UsageError(
            problem(
                "verify",
                received=f"a bundle quantised by '{manifest.quantization.recipe}'",
                expected="a tolerance that allows for it: rounding explains only so much",
                fix="pass --tolerance, or compare perplexities with 'sinkexport eval'",
            )
        )
    if num_tokens > MAX_TOKENS:
        raise UsageError(
            problem(
                "--wraps",
                received=f"{wraps}, which are {num_tokens} tokens",
                expected=f"at most {MAX_TOKENS} tokens",
                fix="verify fewer",
            )
        )


def _num_q_heads(manifest: Manifest, config: Any) -> int:
    """Query heads by the model's configuration, which says nothing of layers that differ, nor of none at all."""
    given = None if manifest.attention is not None else getattr(config, "num_attention_heads", None)
    return manifest.model.num_q_heads if given is None else int(given)


def check_same_model(manifest: Manifest, model: Any) -> None:
    """Refuse a model that cannot be the bundle's: its logits could not be compared.

    Raises: UsageError.
    """
    config = model.config.get_text_config()
    facts = manifest.model
    for what, ours, theirs in (
        ("architecture", facts.architecture, type(model).__name__),
        ("layers", facts.num_layers, config.num_hidden_layers),
        ("hidden size", facts.hidden_size, config.hidden_size),
        ("query heads", facts.num_q_heads, _num_q_heads(manifest, config)),
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
