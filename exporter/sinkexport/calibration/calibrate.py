"""Find the ranges of a model's inputs by streaming text through sinks and window, as a bundle will.

One pass gives histograms, from which ranges are read. With smoothing (SmoothQuant, arXiv:2211.10438) a pass before it
finds the channels' largest values, hence the divisors, and the histograms are those of divided inputs. Where weights
are rounded for their inputs (GPTQ, arXiv:2210.17323), passes after it gather the inputs' second moments.

A calibration that is cut short goes on where it stopped: after each piece of text all that was seen is written to a
file beside the result. Counts and maxima do not depend on how often it was stopped, so neither does the result.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import torch
from sinkrt.errors import UsageError, problem

from sinkexport.calibration import histogram
from sinkexport.calibration.file import (
    FILE_SCHEMA_VERSION,
    FORMAT,
    CalibratedModel,
    CalibrationFile,
    CalibrationText,
    InputFacts,
    Span,
    fingerprint,
    rounded,
    rounding_of,
    smooths_sinks,
)
from sinkexport.calibration.observers import (
    REST,
    SINKS,
    Arrays,
    ChannelMaxima,
    Histograms,
    Resumable,
    ResumableObserver,
)
from sinkexport.calibration.rounding import RoundedArrays, SecondMoments, batches, round_batch
from sinkexport.calibration.stream_inputs import StreamConfig, input_groups, stream_inputs
from sinkexport.graph.quantize.recipe_plan import RecipePlan
from sinkexport.loading.tokenizers.source_tokenizer import SourceTokenizer
from sinkexport.model.interface import intercept_attention
from sinkexport.model.probe import probe_attention
from sinkexport.model.rope import AttentionShape
from sinkexport.quant.recipe import Calibration, Recipe
from sinkexport.sources import LoadedModel
from sinkexport.util import files
from sinkexport.util.progress import Report, silent

PRODUCERS = ("sinkexport", "torch", "transformers", "numpy")
LEAST = 1e-5
"""Largest values of channels and of weights are taken to be at least this: a divisor must not be 0."""

MOMENTS_BYTES = 2 * 2**30
"""Memory for the second moments of inputs. Models that need more take more passes over the text."""
KEPT_BYTES = 2**30
"""What is written after each piece of text. Of more, only whole passes are kept."""

CHANNELS, RANGES, MOMENTS = "channels", "ranges", "moments"
"""Passes over the text, in their order; of the last kind there may be several."""

Ids = npt.NDArray[np.int64]


class Calibrated(NamedTuple):
    """facts: the file. rounded: what `RoundedFile` reads, of a recipe that rounds weights for their inputs, else {}."""

    facts: CalibrationFile
    rounded: Arrays


def calibrate(
    loaded: LoadedModel, recipe: Recipe, text: str, *, partial: Path | None = None, report: Report = silent
) -> Calibrated:
    """Stream pieces of `text` and find what `recipe` needs.

    loaded: in float32. partial: where to keep what has been seen, and to go on from; for the caller to remove once the
    result is written. One that belongs to another calibration is replaced.
    report: told of the stages ``channels`` (with smoothing), ``ranges`` and ``moments`` (where weights are rounded for
    their inputs), in tokens, and of ``round``, in inputs.

    Raises: UsageError if the recipe needs no calibration, the text is too short, the model cannot be streamed exactly,
    its activations are not finite, or `partial` cannot be written.
    """
    model = loaded.model
    recipe = recipe.for_family(model.config.get_text_config().model_type)
    asked = recipe.calibration
    if asked is None:
        raise UsageError(
            problem(
                f"recipe '{recipe.name}'",
                received="no calibration in it",
                expected="activations.mode: static, smooth or weights.rounding: gptq",
                fix="export with it as it is",
            )
        )
    pieces, num_tokens = choose_pieces(loaded.tokenizer, text, asked)
    head = model.get_output_embeddings()
    groups = {name: same for name, same in input_groups(model).items() if model.get_submodule(name) is not head}
    result = CalibrationFile(
        format=FORMAT,
        schema_version=FILE_SCHEMA_VERSION,
        model=CalibratedModel(name=loaded.name, architecture=type(model).__name__, fingerprint=fingerprint(model)),
        recipe=recipe.name,
        calibration=asked,
        smooth=recipe.smooth,
        smooth_sinks=smooths_sinks(recipe),
        rounded_weights=rounding_of(recipe),
        text=CalibrationText(sha256=hashlib.sha256(text.encode()).hexdigest(), tokens=num_tokens, streamed=pieces.size),
        producer={name: importlib.metadata.version(name) for name in PRODUCERS},
        inputs=(),
    )
    memory = _Memory(partial, result.sha256, len(pieces))
    passes = _Passes(model, pieces, StreamConfig(asked.sink_tokens, asked.window), memory, report)
    found: dict[str, Any] = {"inputs": _ranges(passes, recipe, asked, groups) if recipe.needs_ranges else ()}
    weights = _rounded_weights(passes, recipe, groups)
    if weights:
        digest = hashlib.sha256(safetensors.numpy.save(weights)).hexdigest()
        found["rounded_weights"] = rounding_of(recipe, digest)
    facts = {key: getattr(result, key) for key in type(result).model_fields}
    return Calibrated(CalibrationFile(**{**facts, **found}), weights)


class _Passes:
    """Passes over the same pieces of text. known: what passes have found, which is kept with what comes after."""

    def __init__(self, model: Any, pieces: Ids, stream: StreamConfig, memory: _Memory, report: Report) -> None:
        self.model = model
        self.known: dict[str, Resumable] = {}
        self.report = report
        self._pieces = pieces
        self._stream = stream
        self._memory = memory

    def run(
        self,
        stage: str,
        observers: Mapping[str, ResumableObserver],
        groups: Mapping[str, tuple[str, ...]],
        number: int = 0,
    ) -> None:
        """stage, number: a kind of pass, and which of this kind. Does nothing if it was run to its end before."""
        everything = {**self.known, **observers}
        stream_inputs(
            self.model,
            self._pieces,
            self._stream,
            list(observers.values()),
            lambda _, done, total: self.report(stage, done, total),
            groups=groups,
            first_piece=self._memory.restore((stage, number), everything),
            after_piece=functools.partial(self._memory.keep, (stage, number), everything),
        )


def _ranges(
    passes: _Passes, recipe: Recipe, asked: Calibration, groups: Mapping[str, tuple[str, ...]]
) -> tuple[InputFacts, ...]:
    maxima, with_sinks = ChannelMaxima(), smooths_sinks(recipe)
    divisors: dict[str, npt.NDArray[np.float32]] = {}
    if recipe.smooth is None:
        histograms = Histograms()
        passes.run(RANGES, {"maxima": maxima, "histograms": histograms}, groups)
        passes.known["maxima"] = maxima
    else:
        passes.run(CHANNELS, {"maxima": maxima}, groups)
        passes.known["maxima"] = maxima
        divisors = smoothing(passes.model, groups, maxima, recipe.smooth.alpha, with_sinks=with_sinks)
        histograms = Histograms(divisors)
        passes.run(RANGES, {"histograms": histograms}, groups)
    passes.known["histograms"] = histograms
    inputs = []
    for first, members in groups.items():
        rest, sinks, together = _spans(histograms.counts[first], histograms.highest[first], asked)
        channels = tuple(rounded(x) for x in _counted(maxima.maxima[first], with_sinks))
        divided = tuple(rounded(x) for x in divisors[first]) if first in divisors else None
        inputs.append(
            InputFacts(modules=members, rest=rest, sinks=sinks, all=together, channels=channels, divisors=divided)
        )
    return tuple(inputs)


def _rounded_weights(passes: _Passes, recipe: Recipe, groups: Mapping[str, tuple[str, ...]]) -> Arrays:
    plan = RecipePlan(recipe, passes.model, "float32")
    schemes = {
        name: scheme
        for members in groups.values()
        for name in members
        if (scheme := plan.scheme_for_inputs(name)) is not None
    }
    read = {first: members for first, members in groups.items() if any(name in schemes for name in members)}
    weights = RoundedArrays()
    passes.known["weights"] = weights
    for number, batch in enumerate(batches(read, passes.model, MOMENTS_BYTES)):
        moments = SecondMoments()
        passes.run(MOMENTS, {"moments": moments}, batch, number)
        if not weights.has(batch):  # a run that was cut short in a later pass has them
            weights.add(round_batch(passes.model, batch, moments, schemes, passes.report))
    return weights.arrays


def choose_pieces(tokenizer: SourceTokenizer | None, text: str, asked: Calibration) -> tuple[Ids, int]:
    """Pieces of a text, ids [samples, length], and how many tokens it has.

    The text is cut into pieces, of which the seed picks some; they stay in order. Each begins as a stream does, with
    what the tokenizer puts before a text.

    Raises: UsageError without a tokenizer, or if the text is too short.
    """
    if tokenizer is None:
        raise UsageError(
            problem(
                "model",
                received="one without a tokenizer",
                expected="a tokenizer for the text",
                fix="use a complete model folder",
            )
        )
    ids = np.asarray(tokenizer.encode(text, special=False), np.int64)
    beginning = np.asarray(tokenizer.beginning, np.int64)
    own = asked.length - len(beginning)
    if own < 1 or len(ids) < asked.samples * own:
        raise UsageError(
            problem(
                "text",
                received=f"{len(ids):,} tokens",
                expected=f"{asked.samples} pieces of {asked.length:,} tokens",
                fix="use a longer text, or lower calibration.samples or length",
            )
        )
    chosen = np.sort(np.random.default_rng(asked.seed).permutation(len(ids) // own)[: asked.samples])
    pieces = [np.concatenate([beginning, ids[i * own : (i + 1) * own]]) for i in chosen]
    return np.stack(pieces), len(ids)


def smoothing(
    model: Any, groups: Mapping[str, tuple[str, ...]], maxima: ChannelMaxima, alpha: float, *, with_sinks: bool
) -> dict[str, npt.NDArray[np.float32]]:
    """What to divide each input by, [K] by the first module of each group, as they are written to the file.

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), w of all layers that read x, scaled to a geometric mean of 1. Query
    heads that share a value head share their divisors, so that the values' projection can take them over.
    """
    shape, _ = probe_attention(model, model.config.get_text_config().num_hidden_layers)
    outputs = attention_outputs(model, groups)
    found = {}
    for first, members in groups.items():
        x = _counted(maxima.maxima[first], with_sinks).astype(np.float64)
        w = np.max(
            [model.get_submodule(name).weight.detach().float().abs().amax(dim=0).numpy() for name in members], axis=0
        ).astype(np.float64)
        if first in outputs:
            x, w = _shared(x, shape), _shared(w, shape)
        divisors = np.maximum(x, LEAST) ** alpha / np.maximum(w, LEAST) ** (1.0 - alpha)
        divisors /= np.exp(np.log(divisors).mean())
        found[first] = np.array([rounded(value) for value in divisors], np.float32)
    return found


def attention_outputs(model: Any, groups: Mapping[str, tuple[str, ...]]) -> set[str]:
    """The first modules of groups that read what attention gives, head by head, and nothing else.

    One token is run to find out: their inputs lie where the attention function's results do.
    """
    results: list[torch.Tensor] = []  # kept, or an address could come twice
    found: set[str] = set()

    def attend(
        _module: Any, q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        results.append(q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3]))  # [B, 1, Hq, D]
        return results[-1], None

    def look(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def hook(_module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0]
            if any(x.data_ptr() == out.data_ptr() and x.numel() == out.numel() for out in results):
                found.add(name)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(look(name)) for name in groups]
    try:
        with torch.no_grad(), intercept_attention(model, attend):
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _shared(values: npt.NDArray[np.float64], shape: AttentionShape) -> npt.NDArray[np.float64]:
    """[Hq * D]: the largest of the query heads that share a value head."""
    heads = values.reshape(shape.num_kv_heads, -1, shape.head_dim)  # [Hkv, Hq / Hkv, D]
    return np.broadcast_to(heads.max(axis=1, keepdims=True), heads.shape).reshape(-1)


def _counted(maxima: npt.NDArray[np.float32], with_sinks: bool) -> npt.NDArray[np.float32]:
    """[K] of [2, K]."""
    return maxima.max(axis=0) if with_sinks else maxima[REST]


def _spans(
    counts: histogram.Counts, highest: npt.NDArray[np.float32], asked: Calibration
) -> tuple[Span, Span | None, Span]:
    """Of the rest, of sinks and of all. Sinks are few and their largest values matter most: none is left out."""

    def span(of: histogram.Counts, top: float) -> Span:
        return Span(highest=rounded(top), range=rounded(chosen_range(of, top, asked)))

    sinks = rounded(highest[SINKS])
    return (
        span(counts[REST], float(highest[REST])),
        Span(highest=sinks, range=sinks) if counts[SINKS].any() else None,
        span(counts.sum(axis=0), float(highest.max())),
    )


def chosen_range(counts: histogram.Counts, highest: float, asked: Calibration) -> float:
    """The bound that a method chooses for values with these counts, the largest of which is `highest`."""
    if asked.method == "minmax" or highest == 0.0:
        return highest
    if asked.percentile is not None:
        return histogram.percentile(counts, highest, asked.percentile)
    choose = histogram.least_divergence if asked.method == "entropy" else histogram.least_squared_error
    return choose(counts, highest)


class _Memory:
    """What has been seen so far, in a file. key: of this calibration; a file with another one is not read.

    A pass over the text is its kind and its number among those of its kind.
    """

    def __init__(self, path: Path | None, key: str, num_pieces: int) -> None:
        self._path = path
        self._key = key
        self._num_pieces = num_pieces

    def keep(self, this: tuple[str, int], observers: Mapping[str, Resumable], done: int) -> None:
        """Write all of it; a crash leaves the file that was there."""
        if self._path is None:
            return
        arrays = {f"{name}|{key}": value for name, o in observers.items() for key, value in o.state().items()}
        if done < self._num_pieces and sum(value.nbytes for value in arrays.values()) > KEPT_BYTES:
            return
        metadata = {"key": self._key, "pass": json.dumps(this), "done": json.dumps(done)}
        files.write_whole(self._path, safetensors.numpy.save(arrays, metadata), "--output")

    def restore(self, this: tuple[str, int], observers: Mapping[str, Resumable]) -> int:
        """Fill the observers with what was written in this pass or a later one. Returns: pieces that are done."""
        if self._path is None or not self._path.exists():
            return 0
        try:
            with safetensors.safe_open(self._path, "np") as file:
                metadata = file.metadata() or {}
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, safetensors.SafetensorError):
            return 0  # damaged: begin anew
        if metadata.get("key") != self._key:
            return 0
        kept = tuple(json.loads(metadata["pass"]))
        if _order(kept) < _order(this):  # nothing of this pass yet
            return 0
        for name, observer in observers.items():
            prefix = f"{name}|"
            observer.restore({k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)})
        return int(metadata["done"]) if kept == this else self._num_pieces


def _order(this: tuple[str, int]) -> tuple[int, int]:
    return (CHANNELS, RANGES, MOMENTS).index(this[0]), this[1]
