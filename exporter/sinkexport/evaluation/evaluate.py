"""Perplexity of a bundle over a long text, alone or beside the alternatives. See `perplexity` and `contenders`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sinkrt.contract import Manifest, load_manifest
from sinkrt.errors import UsageError, problem
from sinkrt.session import Session
from sinkrt.text import Tokenizer

from sinkexport.bench.machine import torch_threads
from sinkexport.evaluation import baselines as contenders
from sinkexport.evaluation.perplexity import Contender, Curve, Ids, check_segment, check_text, measure
from sinkexport.util.progress import Report, silent
from sinkexport.variants.affine import AffineFile, affine_of
from sinkexport.variants.head_windows import budgets_of

if TYPE_CHECKING:
    from sinkexport.sources import LoadedModel

DEFAULT_TOKENS = 20_000
DEFAULT_SEGMENT_TOKENS = 512
DEFAULT_DENSE_TOKENS = 4096
"""Where the dense model stops unless told otherwise: its memory and its time for a token grow with the text."""

RECOMPUTE_SHARE = 8
"""Recomputation predicts C / 8 tokens a run by default: 8 tokens are computed for each that counts, and each is
predicted from at least 7/8 of C."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a bundle is compared with.

    against: the model that was exported, a directory, ``.gguf`` file, Hub id, or one loaded in float32.
    dense_tokens: where the dense model stops, >= 1, or at the model's own limit, whichever is less.
    recompute_block: tokens that each run of recomputation predicts, 1 .. C; None: C / `RECOMPUTE_SHARE`.
    """

    against: str | LoadedModel
    dense_tokens: int = DEFAULT_DENSE_TOKENS
    recompute_block: int | None = None


@dataclasses.dataclass(frozen=True)
class EvalReport:
    """What `evaluate` found.

    num_tokens: of the text; all but the first are predicted. segment_tokens: length of a segment of the curves.
    model: the bundle's own name for it. curves: the bundle's first.
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
        """C, tokens: from token C + 1 on something has been evicted."""
        return self.num_sink_tokens + self.window_size

    def to_json(self) -> str:
        """The report as JSON; a number that is not finite becomes null."""
        return json.dumps(finite(dataclasses.asdict(self)), indent=1) + "\n"


def evaluate(
    bundle: Path | str,
    text: str,
    *,
    num_tokens: int = DEFAULT_TOKENS,
    segment_tokens: int = DEFAULT_SEGMENT_TOKENS,
    compare: Comparison | None = None,
    backend: str = "ort",
    threads: int | None = None,
    report: Report = silent,
) -> EvalReport:
    """Stream the first `num_tokens` tokens of `text` (or all, if there are fewer) through the bundle, one by one.

    compare: predict the same tokens in other ways too, one after the other; needs torch.
    threads: CPU threads; None for all physical cores.
    report: told of the stages ``load`` and ``Curve.name``.

    Raises: UsageError for bad arguments, a text of fewer than 2 tokens, a bundle of several streams or without a
        tokenizer, and a model that is not the bundle's; BundleError for a broken bundle; BackendError.
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
            run = [contenders.bundle(session, ids, f"{backend}, {stream.num_sink_tokens} sinks + {stream.window_size}")]
            curves += _measured(run, ids, segment_tokens, stream.capacity, report)
        if compare is not None and loaded is not None:
            run = _alternatives(
                loaded.model, ids, manifest, affine_of(Path(bundle), manifest), compare.dense_tokens, block or 1
            )
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


def _alternatives(
    model: Any, ids: Ids, manifest: Manifest, affine: AffineFile | None, dense_tokens: int, block: int
) -> list[Contender]:
    """The same sinks and window in torch, and what one would do without: all with a cache of C tokens."""
    stream = manifest.stream
    config = model.config.get_text_config()
    limit = min(dense_tokens, getattr(config, "max_position_embeddings", None) or dense_tokens)
    return [
        contenders.sinks_and_window(
            model,
            ids,
            stream.num_sink_tokens,
            stream.window_size,
            name="sinks + window",
            sink_tuning=manifest.sink_tuning,
            budgets=budgets_of(manifest),
            affine=affine,
        ),
        contenders.sinks_and_window(model, ids, 0, stream.capacity, name="window only"),
        contenders.recomputation(model, ids, stream.capacity, block),
        contenders.dense(model, ids, limit),
    ]


def _measured(run: list[Contender], ids: Ids, segment_tokens: int, capacity: int, report: Report) -> Iterator[Curve]:
    for contender in run:
        yield measure(contender, ids, segment_tokens=segment_tokens, capacity=capacity, report=report)


def _load(source: str | LoadedModel, manifest: Manifest) -> LoadedModel:
    from sinkexport.evaluation.parity import check_same_model
    from sinkexport.sources import load_model

    loaded = load_model(source, "float32") if isinstance(source, str) else source
    check_same_model(manifest, loaded.model)
    return loaded


def encode(bundle: Path, manifest: Manifest, text: str) -> Ids:
    """int64 [n], by the bundle's tokenizer.

    Raises: UsageError if it gives ids that the model does not know.
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


def _checked_block(compare: Comparison, capacity: int) -> int:
    """Tokens of a run of recomputation, with the default filled in."""
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
    """`value` with None for every float that JSON has no number for."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
