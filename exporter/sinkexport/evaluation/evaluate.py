"""Perplexity of a bundle over a long text, alone or beside baselines. See `perplexity` and `baselines`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sinkrt.backends import BACKENDS
from sinkrt.contract import Manifest, load_manifest
from sinkrt.errors import UsageError, problem
from sinkrt.session import Session
from sinkrt.text import Tokenizer

from sinkexport.bench.machine import torch_threads
from sinkexport.evaluation import baselines
from sinkexport.evaluation.defaults import EVAL_DENSE_TOKENS, EVAL_SEGMENT_TOKENS, EVAL_TOKENS
from sinkexport.evaluation.perplexity import Curve, Ids, Predictor, check_segment, check_text, measure
from sinkexport.util.progress import Report, silent
from sinkexport.variants.variant import AttentionVariant

if TYPE_CHECKING:
    from sinkexport.sources import LoadedModel

RECOMPUTE_SHARE = 8
"""Recomputation predicts C / 8 tokens a run by default.

So it computes 8 tokens for each prediction, which sees at least 7/8 of C.
"""


@dataclasses.dataclass(frozen=True)
class BaselineOptions:
    """Baselines that a bundle is compared with.

    against: the model that was exported: a directory, ``.gguf`` file or Hub id, or one loaded in float32.
    dense_tokens: where the dense model stops, >= 1, or at the model's own limit, whichever is less.
    recompute_block: tokens that each run of recomputation predicts, 1 .. C; None: C / `RECOMPUTE_SHARE`.
    """

    against: str | LoadedModel
    dense_tokens: int = EVAL_DENSE_TOKENS
    recompute_block: int | None = None


@dataclasses.dataclass(frozen=True)
class EvalReport:
    """Result of `evaluate`.

    num_tokens: of the text; all but the first are predicted. segment_tokens: length of a segment of the curves.
    model: the bundle's name of it. curves: the bundle's comes first, then the baselines'.
    """

    bundle: str
    model: str
    weights_dtype: str
    backend: str
    num_sink_tokens: int
    window_size: int
    num_tokens: int
    segment_tokens: int
    curves: tuple[Curve, ...]

    @property
    def capacity(self) -> int:
        """C, tokens: from token C + 1 on, tokens have been evicted."""
        return self.num_sink_tokens + self.window_size

    def to_json(self) -> str:
        """Write the report as JSON; a number that is not finite becomes null."""
        return json.dumps(finite(dataclasses.asdict(self)), indent=1) + "\n"


def evaluate(
    bundle: Path | str,
    text: str,
    *,
    num_tokens: int = EVAL_TOKENS,
    segment_tokens: int = EVAL_SEGMENT_TOKENS,
    compare: BaselineOptions | None = None,
    backend: str = BACKENDS[0],
    threads: int | None = None,
    report: Report = silent,
) -> EvalReport:
    """Stream the first `num_tokens` tokens of `text` (or all, if there are fewer) through the bundle, one by one.

    compare: predict the same tokens with baselines too, one after the other; needs torch.
    threads: CPU threads; None for all physical cores.
    report: called with the stages ``load`` and ``Curve.name``.

    Raises: UsageError for bad arguments, a text of fewer than 2 tokens, a bundle of several streams or without a
        tokenizer, or another model than the bundle's; BundleError for a broken bundle; BackendError.
    """
    check_segment(segment_tokens)
    if num_tokens < 2:
        raise UsageError(problem("tokens", received=num_tokens, expected=">= 2", fix="change --tokens"))
    manifest = load_manifest(Path(bundle))
    stream = manifest.stream
    if stream.batch != 1:
        raise UsageError(
            problem(
                "eval", received=f"a bundle of {stream.batch} streams", expected="batch 1", fix="export with --batch 1"
            )
        )
    block = None if compare is None else _checked_block(compare, stream.capacity)
    ids = encode(Path(bundle), manifest, text)[:num_tokens]
    check_text(ids)
    curves: list[Curve] = []
    report("load", 0, 1)
    with torch_threads(threads if compare is not None else None):
        loaded = None if compare is None else _load(compare.against, manifest)
        with Session.load(bundle, backend, threads=threads) as session:
            report("load", 1, 1)
            run = [baselines.bundle(session, ids, f"{backend}, {stream.num_sink_tokens} sinks + {stream.window_size}")]
            curves += _measured(run, ids, segment_tokens, stream.capacity, report)
        if compare is not None and loaded is not None:
            variant = AttentionVariant.of_bundle(Path(bundle), manifest)
            run = _baselines(loaded.model, ids, manifest, variant, compare.dense_tokens, block or 1)
            curves += _measured(run, ids, segment_tokens, stream.capacity, report)
    return EvalReport(
        bundle=str(bundle),
        model=manifest.model.name,
        weights_dtype=manifest.weights_dtype,
        backend=backend,
        num_sink_tokens=stream.num_sink_tokens,
        window_size=stream.window_size,
        num_tokens=len(ids),
        segment_tokens=segment_tokens,
        curves=tuple(curves),
    )


def _baselines(
    model: Any, ids: Ids, manifest: Manifest, variant: AttentionVariant, dense_tokens: int, block: int
) -> list[Predictor]:
    """List the baselines: the same sinks and window in torch, and alternatives. All have a cache of C tokens."""
    stream = manifest.stream
    config = model.config.get_text_config()
    limit = min(dense_tokens, getattr(config, "max_position_embeddings", None) or dense_tokens)
    return [
        baselines.sinks_and_window(
            model,
            ids,
            stream.num_sink_tokens,
            stream.window_size,
            name="sinks + window",
            variant=variant,
        ),
        baselines.sinks_and_window(model, ids, 0, stream.capacity, name="window only"),
        baselines.recomputation(model, ids, stream.capacity, block),
        baselines.dense(model, ids, limit),
    ]


def _measured(run: list[Predictor], ids: Ids, segment_tokens: int, capacity: int, report: Report) -> Iterator[Curve]:
    for predictor in run:
        yield measure(predictor, ids, segment_tokens=segment_tokens, capacity=capacity, report=report)


def _load(source: str | LoadedModel, manifest: Manifest) -> LoadedModel:
    from sinkexport.evaluation.parity import check_same_model
    from sinkexport.sources import load_model

    loaded = load_model(source, "float32") if isinstance(source, str) else source
    check_same_model(manifest, loaded.model)
    return loaded


def encode(bundle: Path, manifest: Manifest, text: str) -> Ids:
    """Encode a text with the bundle's tokenizer. Returns: int64 [n].

    Raises: UsageError for ids that the model does not know.
    """
    ids = np.asarray(Tokenizer.load(bundle, manifest).encode(text), dtype=np.int64)
    vocab_size = manifest.model.vocab_size
    if ids.size and int(ids.max()) >= vocab_size:
        raise UsageError(
            problem(
                "tokenizer",
                received=f"token id {int(ids.max())}",
                expected=f"ids below the model's {vocab_size}",
                fix="export the model with its own tokenizer",
            )
        )
    return ids


def _checked_block(compare: BaselineOptions, capacity: int) -> int:
    """Check the tokens of a run of recomputation; fill the default in."""
    if compare.dense_tokens < 1:
        raise UsageError(
            problem("dense tokens", received=compare.dense_tokens, expected=">= 1", fix="change --dense-tokens")
        )
    block = max(1, capacity // RECOMPUTE_SHARE) if compare.recompute_block is None else compare.recompute_block
    if not 1 <= block <= capacity:
        raise UsageError(
            problem(
                "recompute block", received=block, expected=f"1 .. S + W = {capacity}", fix="change --recompute-block"
            )
        )
    return block


def finite(value: Any) -> Any:
    """Replace every float that JSON has no number for by None."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
