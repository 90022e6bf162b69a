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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from sinkrt.errors import UsageError, problem

from sinkexport.calibration.checkpoint import CHANNELS, MOMENTS, RANGES, Checkpoint
from sinkexport.calibration.file import (
    FILE_SCHEMA_VERSION,
    FORMAT,
    CalibratedModel,
    CalibrationFile,
    CalibrationText,
    InputFacts,
    fingerprint,
    rounded,
    rounding_of,
    smooths_sinks,
)
from sinkexport.calibration.observers import Arrays, ChannelMaxima, Histograms, Resumable, ResumableObserver
from sinkexport.calibration.pieces import Ids, choose_pieces
from sinkexport.calibration.rounding import RoundedArrays, SecondMoments, batches, round_batch
from sinkexport.calibration.smoothing import smoothing
from sinkexport.calibration.spans import spans
from sinkexport.calibration.stream_inputs import StreamConfig, input_groups, stream_inputs
from sinkexport.graph.quantize.recipe_plan import RecipePlan
from sinkexport.quant.recipe import Calibration, Recipe
from sinkexport.sources import LoadedModel
from sinkexport.util.progress import Report, silent

PRODUCERS = ("sinkexport", "torch", "transformers", "numpy")
MOMENTS_BYTES = 2 * 2**30
"""Memory for the second moments of inputs. Models that need more take more passes over the text."""


class Calibrated(NamedTuple):
    """facts: the file. rounded: what `RoundedFile` reads, of a recipe that rounds weights for their inputs, else {}."""

    facts: CalibrationFile
    rounded: Arrays


def calibrate(
    loaded: LoadedModel,
    recipe: Recipe,
    text: str,
    *,
    partial: Path | None = None,
    report: Report = silent,
    moments_bytes: int = MOMENTS_BYTES,
) -> Calibrated:
    """Stream pieces of `text` and find what `recipe` needs.

    loaded: in float32. partial: where to keep what has been seen, and to go on from; for the caller to remove once the
    result is written. One that belongs to another calibration is replaced.
    report: gets the stages ``channels`` (with smoothing), ``ranges`` and ``moments`` (where weights are rounded for
    their inputs), in tokens, and ``round``, in inputs. moments_bytes: memory for second moments.

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
    pieces, num_tokens = choose_pieces(loaded.text_tokenizer(), text, asked)
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
    checkpoint = Checkpoint(partial, result.sha256, len(pieces))
    passes = _Passes(model, pieces, StreamConfig(asked.sink_tokens, asked.window), checkpoint, report)
    found: dict[str, Any] = {"inputs": _ranges(passes, recipe, asked, groups) if recipe.needs_ranges else ()}
    weights = _rounded_weights(passes, recipe, groups, moments_bytes)
    if weights:
        digest = hashlib.sha256(safetensors.numpy.save(weights)).hexdigest()
        found["rounded_weights"] = rounding_of(recipe, digest)
    facts = {key: getattr(result, key) for key in type(result).model_fields}
    return Calibrated(CalibrationFile(**{**facts, **found}), weights)


class _Passes:
    """Passes over the same pieces of text. known: what passes have found, which is kept with what comes after."""

    def __init__(self, model: Any, pieces: Ids, stream: StreamConfig, checkpoint: Checkpoint, report: Report) -> None:
        self.model = model
        self.known: dict[str, Resumable] = {}
        self.report = report
        self._pieces = pieces
        self._stream = stream
        self._checkpoint = checkpoint

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
            first_piece=self._checkpoint.restore((stage, number), everything),
            after_piece=functools.partial(self._checkpoint.keep, (stage, number), everything),
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
        rest, sinks, together = spans(histograms.counts[first], histograms.highest[first], asked)
        channels = tuple(rounded(x) for x in maxima.counted(first, with_sinks=with_sinks))
        divided = tuple(rounded(x) for x in divisors[first]) if first in divisors else None
        inputs.append(
            InputFacts(modules=members, rest=rest, sinks=sinks, all=together, channels=channels, divisors=divided)
        )
    return tuple(inputs)


def _rounded_weights(
    passes: _Passes, recipe: Recipe, groups: Mapping[str, tuple[str, ...]], moments_bytes: int
) -> Arrays:
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
    for number, batch in enumerate(batches(read, passes.model, moments_bytes)):
        moments = SecondMoments()
        passes.run(MOMENTS, {"moments": moments}, batch, number)
        if not weights.has(batch):  # a run that was cut short in a later pass has them
            weights.add(round_batch(passes.model, batch, moments, schemes, passes.report))
    return weights.arrays
