"""What becomes of the weights of a quantised checkpoint: which recipes they may have, their plan, and the report."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence

from sinkrt.contract import Manifest
from sinkrt.errors import UsageError, problem

from sinkexport.config import WEIGHT_DTYPES, ExportConfig, target_of
from sinkexport.graph.quantize.plan import Plan
from sinkexport.graph.quantize.stored_plan import StoredPlan
from sinkexport.loading.origin import LoadedModel
from sinkexport.loading.stored.matrices import is_quantized_folder, quantized_tensors
from sinkexport.loading.stored.tensors import ComputedTensor
from sinkexport.pipeline.manifest_facts import quantization_facts
from sinkexport.quant.recipe import Recipe, load_recipe
from sinkexport.quant.weight import WeightScheme

STORED = "quantised weights"
"""Entry of a manifest's `producer` that says what became of a quantised checkpoint's tensors."""

STORED_RECIPE = "stored"
"""Recipe of a folder of quantised weights where none is given."""


@dataclasses.dataclass(frozen=True)
class StoredWeights:
    """Quantised tensors of a source that a recipe is about; none for other recipes. plan: None: none is kept."""

    tensors: Sequence[ComputedTensor] = ()
    plan: StoredPlan | None = None

    def planner(self, otherwise: Callable[..., Plan]) -> Callable[..., Plan]:
        """What makes the plan of each graph. otherwise: that of other recipes."""
        plan = self.plan
        return otherwise if plan is None else lambda *_arguments: plan

    def described(self, manifest: Manifest, config: ExportConfig) -> Manifest:
        """The manifest with what became of the tensors, once the graphs are built."""
        if not self.tensors:
            return manifest
        kept = {} if self.plan is None else self.plan.kept
        words = _words(self.tensors, kept, is_half=config.dtype == "fp16")
        quantization = quantization_facts(config, list(kept.values()))
        return dataclasses.replace(manifest, producer={**manifest.producer, STORED: words}, quantization=quantization)


def recipe_for(recipe: Recipe | None, loaded: LoadedModel) -> Recipe | None:
    """The recipe of an export: a folder of quantised weights keeps them where none is given.

    GGUF files may be rounded again: their numbers are dequantised, as they always were.

    Raises: UsageError for a recipe that rounds what is integers already, or keeps integers that are not there.
    """
    is_quantized = is_quantized_folder(loaded)
    if recipe is None:
        return load_recipe(STORED_RECIPE) if is_quantized else None
    if recipe.stored is None and is_quantized:
        raise UsageError(
            problem(
                f"recipe '{recipe.name}'",
                received=f"'{loaded.name}', whose weights are quantised already",
                expected="a recipe for them: 'stored' or 'stored-float'",
                fix="leave --recipe out (with --kv int8 if the window is to be INT8), or export the "
                "floating-point original",
            )
        )
    is_gguf = loaded.origin is not None and loaded.origin.is_gguf
    if recipe.stored is not None and not (is_quantized or is_gguf):
        raise _nothing_stored(recipe, loaded)
    return recipe


def stored_weights(loaded: LoadedModel, config: ExportConfig) -> StoredWeights:
    """The quantised tensors of the source, if the recipe is about them, and the plan if it keeps them.

    Raises: UsageError if there are none.
    """
    if config.recipe is None or config.recipe.stored is None:
        return StoredWeights()
    tensors = quantized_tensors(loaded)
    if not tensors:
        raise _nothing_stored(config.recipe, loaded)
    if config.recipe.stored == "float":
        return StoredWeights(tensors)
    matrices = [tensor.matrix for tensor in tensors if tensor.matrix is not None]
    plan = StoredPlan(matrices, loaded.model, WEIGHT_DTYPES[config.dtype], target_of(config).quantization)
    return StoredWeights(tensors, plan)


def _nothing_stored(recipe: Recipe, loaded: LoadedModel) -> UsageError:
    """The refusal of a recipe that keeps integers, for a model that has none."""
    return UsageError(
        problem(
            f"recipe '{recipe.name}'",
            received=f"'{loaded.name}', whose weights are floating point",
            expected="a quantised checkpoint",
            fix="leave --recipe out, or choose one that rounds",
        )
    )


def _words(tensors: Sequence[ComputedTensor], kept: Mapping[str, WeightScheme], *, is_half: bool) -> str:
    """What became of a checkpoint's quantised tensors, in words. is_half: floating point is float16."""
    floats = "dequantised to float16" if is_half else "dequantised"
    counts = collections.Counter(
        f"{tensor.kind} {_form(kept[tensor.name]) if tensor.name in kept else floats}" for tensor in tensors
    )
    return "; ".join(f"{count} x {words}" for words, count in sorted(counts.items()))


def _form(scheme: WeightScheme) -> str:
    share = "a scale for each output" if scheme.block_size is None else f"blocks of {scheme.block_size}"
    return f"kept in {scheme.bits} bits, {share}{'' if scheme.symmetric else ', zero points'}"
