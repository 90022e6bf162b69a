"""`verify` for bundles whose logits may differ: the bundle and its model in floating point predict the same text.

The floating-point side is a model in torch, many tokens at a time, or a bundle, which needs no torch. It runs in a
thread of its own, a block of tokens ahead of the bundle. The recipe sets how far the two may be from each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from sinkrt.backends import BACKENDS
from sinkrt.contract import MANIFEST_NAME, Manifest, Quantization, load_manifest
from sinkrt.errors import BundleError, UsageError, problem
from sinkrt.session import Session

from sinkexport.bench.machine import physical_cores, torch_threads
from sinkexport.evaluation import baselines
from sinkexport.evaluation.comparison import Comparison, compare_prefill, piece_ends, prefill_tolerance
from sinkexport.evaluation.defaults import QUALITY_TOKENS
from sinkexport.evaluation.evaluate import encode, finite
from sinkexport.evaluation.perplexity import Ids, Predictor, check_text
from sinkexport.evaluation.quality import BLOCK_TOKENS, Quality, compare_predictions
from sinkexport.util.progress import Report, silent
from sinkexport.variants.variant import AttentionVariant, head_windows_of

if TYPE_CHECKING:
    from sinkexport.sources import LoadedModel


@dataclasses.dataclass(frozen=True)
class Check:
    """One threshold. name: of the figure of `Quality` that it limits. limit: what the figure is held to."""

    name: str
    value: float
    limit: float
    passed: bool


@dataclasses.dataclass(frozen=True)
class QualityReport:
    """Result of `verify_quality`.

    reference: what the bundle was compared with, and how that computed. recipe: None for a floating-point bundle.
    prefill: the bundle's prefill against its own steps, within `prefill_tolerance`.
    checks: the thresholds that the manifest names; none for a floating-point bundle.
    """

    bundle: str
    reference: str
    weights_dtype: str
    recipe: str | None
    num_sink_tokens: int
    window_size: int
    quality: Quality
    checks: tuple[Check, ...]
    prefill: Comparison
    prefill_tolerance: float

    @property
    def failures(self) -> tuple[str, ...]:
        """One line for each threshold that does not hold."""
        lines = [
            f"{check.name}: {check.value:.4g}, {'below' if check.name in AT_LEAST else 'above'} the limit of "
            f"{check.limit:.4g} of recipe '{self.recipe}'"
            for check in self.checks
            if not check.passed
        ]
        if self.prefill.failed_position is not None:
            lines.append(
                f"prefill: error {self.prefill.max_relative_error:.2e} of the logits' spread at position "
                f"{self.prefill.failed_position}, above the tolerance of {self.prefill_tolerance:.1e}"
            )
        return tuple(lines)

    @property
    def passed(self) -> bool:
        """Whether all thresholds hold."""
        return not self.failures

    def to_json(self) -> str:
        """Write the report as JSON; a number that is not finite becomes null."""
        facts = {**dataclasses.asdict(self), "passed": self.passed, "failures": self.failures}
        return json.dumps(finite(facts), indent=1) + "\n"


AT_MOST, AT_LEAST = ("perplexity_increase", "kl_divergence"), ("top1_agreement",)
"""Figures of `Quality` with a threshold that they must not be above, and with one that they must not be below."""


def verify_quality(
    bundle: Path | str,
    against: str | LoadedModel | Predictor,
    text: str,
    *,
    num_tokens: int = QUALITY_TOKENS,
    tolerance: float | None = None,
    backend: str = BACKENDS[0],
    threads: int | None = None,
    report: Report = silent,
) -> QualityReport:
    """Stream the first `num_tokens` tokens of `text` (or all, if there are fewer) through the bundle, one by one.

    against: the model in floating point: a directory, ``.gguf`` file or Hub id, or one loaded in float32. Or a bundle
    of it with the same S and W that is not quantised, which needs no torch. Or its predictions of the same tokens with
    the same S and W, which the caller answers for.
    tolerance: of prefill against single steps; None for `prefill_tolerance`.
    threads: CPU threads of both sides together; None for all physical cores. Only stream 0 of several is used.
    report: called with the stages ``load``, ``quality`` and ``prefill``.

    Raises: UsageError for bad arguments, a text of fewer than 2 tokens, a bundle without a tokenizer, and what is not
        the bundle's model; BundleError for a broken bundle; BackendError, which names a prediction that is not a
        number.
    """
    if num_tokens < 2:
        raise UsageError(problem("tokens", received=num_tokens, expected=">= 2", fix="change --tokens"))
    if tolerance is not None and not tolerance > 0:
        raise UsageError(problem("tolerance", received=tolerance, expected="> 0", fix="change it"))
    manifest = load_manifest(Path(bundle))
    limits = thresholds(manifest.quantization)
    ids = encode(Path(bundle), manifest, text)[:num_tokens]
    check_text(ids)
    stream = manifest.stream
    limit = prefill_tolerance(manifest) if tolerance is None else tolerance
    half = max(1, (threads or physical_cores()) // 2)  # given all cores each, the two would stop each other
    report("load", 0, 1)
    with (
        Session.load(bundle, backend, threads=half) as session,
        torch_threads(None if isinstance(against, Predictor) or is_bundle(against) else half),
        _reference(
            against, manifest, AttentionVariant.of_bundle(Path(bundle), manifest), ids, backend, half
        ) as reference,
    ):
        report("load", 1, 1)
        ends = piece_ends(len(ids) - 1, stream.capacity)
        first = FirstStream(session, ends)
        quality = compare_predictions(reference, baselines.bundle(first, ids, ""), ids, report)
        prefill = compare_prefill(first, ids[None, :-1], first.at_ends, limit, report)
    return QualityReport(
        bundle=str(bundle),
        reference=reference.note,
        weights_dtype=manifest.weights_dtype,
        recipe=None if manifest.quantization is None else manifest.quantization.recipe,
        num_sink_tokens=stream.num_sink_tokens,
        window_size=stream.window_size,
        quality=quality,
        checks=check(quality, limits),
        prefill=prefill,
        prefill_tolerance=limit,
    )


def thresholds(quantization: Quantization | None) -> Mapping[str, float]:
    """Read the thresholds that a manifest holds its bundle to.

    Raises: BundleError for a threshold that this version does not know: it must not pass unseen.
    """
    limits = {} if quantization is None else quantization.thresholds
    for name in limits:
        if name not in (*AT_MOST, *AT_LEAST):
            raise BundleError(
                problem(
                    "quantization.thresholds",
                    received=f"'{name}'",
                    expected=", ".join((*AT_MOST, *AT_LEAST)),
                    fix="upgrade sinkexport or export again",
                )
            )
    return limits


def check(quality: Quality, limits: Mapping[str, float]) -> tuple[Check, ...]:
    """Hold the figures to their thresholds, in the order of `AT_MOST` and `AT_LEAST`. What is not a number fails."""
    checks = []
    for name in (*AT_MOST, *AT_LEAST):
        if name in limits:
            value, limit = float(getattr(quality, name)), limits[name]
            checks.append(Check(name, value, limit, value >= limit if name in AT_LEAST else value <= limit))
    return tuple(checks)


def is_bundle(source: str | LoadedModel) -> bool:
    """Whether a model is named by the folder of a bundle."""
    return isinstance(source, str) and (Path(source) / MANIFEST_NAME).is_file()


class FirstStream:
    """Stream 0 of a session. It keeps the logits of its steps at the ends of prefill's pieces."""

    def __init__(self, session: Session, ends: frozenset[int] = frozenset()) -> None:
        self._session = session
        self._ends = ends
        self.at_ends: dict[int, npt.NDArray[np.float32]] = {}
        """Logits [1, vocab] by the number of tokens fed."""

    def reset(self) -> None:
        """Forget all tokens."""
        self._session.reset()

    def step(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Take one token. ids: int [1]. Returns: logits [1, vocab], overwritten by the next call."""
        logits = self._session.step(ids, streams=[0])[:1]
        if (fed := int(self._session.position[0])) in self._ends:
            self.at_ends[fed] = logits.copy()
        return logits

    def prefill(self, ids: Ids) -> npt.NDArray[np.float32]:
        """Take a prompt. ids: int [1, N]. Returns: logits [1, vocab] after the last, overwritten by the next call."""
        return self._session.prefill(ids, streams=[0])[:1]


@contextlib.contextmanager
def _reference(
    against: str | LoadedModel | Predictor,
    manifest: Manifest,
    variant: AttentionVariant,
    ids: Ids,
    backend: str,
    threads: int,
) -> Iterator[Predictor]:
    """Provide the predictor of ids [N] in floating point with the same S and W.

    Raises: UsageError for another model or another geometry.
    """
    stream = manifest.stream
    if isinstance(against, Predictor):
        yield against
        return
    if isinstance(against, str) and is_bundle(against):
        other = load_manifest(Path(against))
        check_same_bundle(manifest, other)
        with Session.load(against, backend, threads=threads) as session:
            note = f"bundle {against}, {other.weights_dtype}"
            yield dataclasses.replace(baselines.bundle(FirstStream(session), ids, note), name="reference")
        return
    from sinkexport.evaluation.parity import check_same_model
    from sinkexport.sources import load_model

    loaded = load_model(against, "float32") if isinstance(against, str) else against
    check_same_model(manifest, loaded.model)
    predictor = baselines.sinks_and_window(
        loaded.model,
        ids,
        stream.num_sink_tokens,
        stream.window_size,
        name="reference",
        chunk_tokens=BLOCK_TOKENS,
        variant=variant,
    )
    yield dataclasses.replace(predictor, note=f"{loaded.name} in torch, float32")


def check_same_bundle(manifest: Manifest, other: Manifest) -> None:
    """Refuse a bundle that is quantised itself, or of another model or geometry.

    Raises: UsageError.
    """
    if other.quantization is not None:
        raise UsageError(
            problem(
                "--against",
                received=f"a bundle quantised by '{other.quantization.recipe}'",
                expected="one in floating point, or a model",
                fix="export without --recipe",
            )
        )
    ours, theirs = manifest.model, other.model
    for what, mine, found in (
        ("architecture", ours.architecture, theirs.architecture),
        ("layers", ours.num_layers, theirs.num_layers),
        ("hidden size", ours.hidden_size, theirs.hidden_size),
        ("query heads", ours.num_q_heads, theirs.num_q_heads),
        ("key heads", ours.num_kv_heads, theirs.num_kv_heads),
        ("caches", *(_digest(m.attention) for m in (manifest, other))),
        ("vocabulary", ours.vocab_size, theirs.vocab_size),
        ("positions", ours.position_scheme, theirs.position_scheme),
        ("sinks", manifest.stream.num_sink_tokens, other.stream.num_sink_tokens),
        ("window", manifest.stream.window_size, other.stream.window_size),
        ("per-head windows", *(_digest(head_windows_of(m)) for m in (manifest, other))),
        ("sink tuning", *(None if m.sink_tuning is None else m.sink_tuning.sha256[:16] for m in (manifest, other))),
        (
            "affine attention",
            *(None if m.affine_attention is None else m.affine_attention.sha256[:16] for m in (manifest, other)),
        ),
    ):
        if mine != found:
            raise UsageError(
                problem(
                    f"--against: {what}",
                    received=found,
                    expected=f"{mine}, as in the bundle",
                    fix="export the same model with the same --sink-tokens, --window, "
                    "--head-windows, --sink-tuning and --affine",
                )
            )


def _digest(facts: object) -> str | None:
    """A short name of per-head windows, or of the sizes of caches, for messages."""
    return None if facts is None else hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
